"""``btx mix`` in this process or another, and models on the disk to run it on."""

from __future__ import annotations

import argparse
import contextlib
import io

import torch

from megatron_btx.cli import mix
from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import copy
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.weights.test_directories import manifest

LABELS = ("code", "math", "prose", "seed")

RUN = """
import sys, argparse
from megatron_btx.cli import mix
parser = argparse.ArgumentParser()
mix.add_parser(parser.add_subparsers(required=True))
options = parser.parse_args(sys.argv[1:])
sys.exit(options.run(options))
"""


def btx(*words: str) -> tuple[int, str]:
    """Run ``btx mix ...``; exit code and output."""
    options = parsed(*words)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = options.run(options)
    return code, out.getvalue()


def parsed(*words: str) -> argparse.Namespace:
    """The options of ``btx mix ...``."""
    parser = argparse.ArgumentParser()
    mix.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args([str(word) for word in words])


def save(model, path, form: str, dtype=torch.bfloat16) -> None:
    plan = copy(model, dtype=dtype)
    if form == "hf":
        write_hf(plan, path)
    else:
        write_torch_dist(plan, path, files=lambda: manifest(plan), shard=50_000)


def named(sources, form: str = "hf") -> list[str]:
    return [f"{label}={sources / form / label}" for label in LABELS]
