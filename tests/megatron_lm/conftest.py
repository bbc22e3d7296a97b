"""Models that the tests of NVIDIA's trainer share, and its ranks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from tests.families.made import make
from tests.megatron_lm.made import convert, losses_of
from tests.ranks import Ranks


@pytest.fixture(scope="package")
def pool() -> Iterator[Ranks]:
    """Ranks of its own: the trainer leaves much behind in a process."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="package")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Name -> ``transformers``' model and our Megatron directory of it."""
    found = {}
    for name in ("llama", "llama 3.2, tied", "qwen3", "mixtral"):
        directory = tmp_path_factory.mktemp("written")
        model = make(name, directory / "hf")
        convert(directory / "hf", directory / "step", "megatron")
        found[name] = (model, directory / "step")
    return found


@pytest.fixture(scope="package")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The same of a mix by `btx mix`: the losses of its Hugging Face form, and its directory."""
    directory = tmp_path_factory.mktemp("mixed")
    make("llama", directory / "a")
    model = make("llama", directory / "b")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(directory / "b")
    sources = tuple(f"{label}={directory / label}" for label in "ab")
    for form in ("hf", "megatron"):
        out = str(directory / form)
        offline.run(MixRequest(sources=sources, out=out, format=form), io.StringIO())
    return losses_of(directory / "hf"), directory / "megatron"
