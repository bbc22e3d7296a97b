"""The models that go through Megatron-Bridge, and when two directories are one model."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from tests.families import tokenizers_made
from tests.families.made import make

IDS = ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Case:
    """A model of tests/families/made.py with a tokenizer."""

    made: str
    dtype: torch.dtype
    tokenizer: Callable[[Path], Path]
    named: dict[str, str]
    """Begin and end token: in ``config.json`` and in the tokenizer's own files."""
    more: dict[str, Any] = field(default_factory=dict)


_LLAMA = {"bos_token_id": "<|begin_of_text|>", "eos_token_id": "<|end_of_text|>"}
_QWEN = {"eos_token_id": "<|im_end|>"}
CASES = {
    "llama": Case("llama", torch.float32, tokenizers_made.llama3, _LLAMA),
    "llama 3.2, tied": Case("llama 3.2, tied", torch.bfloat16, tokenizers_made.llama3, _LLAMA),
    "qwen3": Case("qwen3", torch.bfloat16, tokenizers_made.qwen, _QWEN),
    "qwen3 moe": Case("qwen3 moe", torch.bfloat16, tokenizers_made.qwen, _QWEN),
}


def make_source(name: str, directory: Path, seed: int = 0) -> Path:
    """A Hugging Face directory of a case.

    Args:
        name: of the case.
        directory: the new directory.
        seed: other weights for another one.
    """
    from tokenizers import Tokenizer

    case = CASES[name]
    case.tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = {key: tokenizer.token_to_id(token) for key, token in case.named.items()}
    size = tokenizer.get_vocab_size() + 3  # rows that no token has, and no multiple of anything
    model = make(case.made, directory, case.dtype, vocab_size=size, **ids)
    if seed:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) / 10)
        model.save_pretrained(directory)
    return directory


def converted(source: Path, out: Path, form: Literal["hf", "megatron"]) -> Path:
    """What ``hf_to_megatron.py`` and ``megatron_to_hf.py`` do."""
    request = MixRequest(sources=(f"model={source}",), out=str(out), method="copy", format=form)
    offline.run(request, io.StringIO())
    return out


def mixed(sources: Sequence[Path], out: Path, form: Literal["hf", "megatron"]) -> Path:
    """What ``btx mix`` does with two dense models."""
    named = tuple(f"{name}={source}" for name, source in zip("ab", sources, strict=True))
    offline.run(MixRequest(sources=named, out=str(out), format=form), io.StringIO())
    return out


def same_model(one: Path, other: Path) -> Iterator[str]:
    """In what a second Hugging Face directory is another model than the first: bits of tensors,
    what its ``config.json`` computes, begin and end, the tokenizer."""
    from transformers import AutoConfig

    mine, theirs = weights(one), weights(other)
    if mine.keys() != theirs.keys():
        yield f"other tensors: {sorted(mine.keys() ^ theirs.keys())[:5]}"
    for name in mine.keys() & theirs.keys():
        same = mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name])
        if not same:
            yield f"{name} differs"
    configs = [AutoConfig.from_pretrained(place) for place in (one, other)]
    for name in (*IDS, "vocab_size", "rope_parameters", "tie_word_embeddings", "model_type"):
        values = [getattr(config, name) for config in configs]
        if values[0] != values[1]:
            yield f"{name} is {values[1]}, was {values[0]}"
    if _encoded(one) != _encoded(other):
        yield "another tokenizer"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of all its safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _encoded(directory: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in tokenizers_made.TEXT]
