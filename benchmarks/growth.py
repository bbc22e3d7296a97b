"""How time grows: ``python benchmarks/growth.py --work DIR`` prints a table of docs/benchmarks.md.

Each row is one command in a process of its own, on random models of hidden size 64 (a layer has
0.2 MB), at sizes that double; seconds are CPU time of the whole command, less that of an empty one
(importing torch). Growth is linear where the last column stays at 2 or below.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import fresh
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model

LAYERS = (20, 40, 80, 160, 320)
SOURCES = (8, 16, 32, 64)

MAIN = "import sys; from megatron_btx.cli.main import main; sys.exit(main())"
BTX = [sys.executable, "-c", MAIN]


def main() -> None:
    """Make the models, run the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    work = parser.parse_args().work
    nothing = seconds([sys.executable, "-c", "import megatron_btx.mix.offline"])
    print("| command | size | CPU s | times the size before |\n| --- | --- | --- | --- |")
    for name, rows in (("layers", verify(work)), ("sources", drift(work))):
        before: tuple[int, float] | None = None
        for command, size, words in rows:
            spent = max(seconds(words) - nothing, 1e-3)
            told = before and before[0] < size and before[1] >= 0.1
            ratio = f"{spent / before[1]:.1f}" if before and told else ""
            print(f"| {command} | {size} {name} | {spent:.1f} | {ratio} |", flush=True)
            before = (size, spent)


def verify(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """``btx verify`` of an MoE of four experts, in both formats."""
    for form in ("megatron", "hf"):
        for layers in LAYERS:
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            sources = [model(work / f"{layers}-{label}", layers, seed) for seed, label in SEEDS]
            mix = ["mix", "--sources", *sources, "--format", form, "--out", str(out)]
            run([*BTX, *mix])
            yield f"`btx verify`, {form}", layers, [*BTX, "verify", str(out)]


def drift(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """``btx drift`` of models of four layers."""
    for count in SOURCES:
        paths = [model(work / f"drift-{at}", 4, at) for at in range(count)]
        yield "`btx drift`", count, [*BTX, "drift", "--sources", *paths, "--out", str(work / "d")]


SEEDS = tuple(enumerate(("code", "math", "prose", "seed")))


def model(path: Path, layers: int, seed: int) -> str:
    """A random model in Hugging Face format, made once."""
    shape = Model(num_layers=layers, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_hf(
            fresh(Architecture(model=shape, vocab_size=512), seed=seed, dtype=torch.bfloat16), path
        )
    return str(path)


def seconds(words: list[str]) -> float:
    """CPU time of a command, its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(words: list[str]) -> None:
    """One command, quietly, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment)


if __name__ == "__main__":
    main()
