"""What we write, in another release of ``transformers``: exits 0 where all of it agrees.

    python -m tests.families.older_transformers PYTHON

Models of every family, mixtures, and tokenizers as recipes and released models have them are
written here; PYTHON, a program that has the other release, reads them. It must give the logits and
token ids that this one gives. Kept as a command, because one environment has one ``transformers``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

TOP = Path(__file__).resolve().parents[2]
MIXES = ("llama 3.1", "mistral", "qwen2, some windows", "qwen3")
EXPECTED = "expected.pt"
OTHERWISE = ("qwen2 moe, no bias", "mix of qwen2, some windows")
"""What 4.57 computes otherwise: its Qwen2-MoE has one mask for all layers, windowed or not."""


def main() -> int:
    """Write and have it read; the exit code."""
    if sys.argv[1] == "--read":
        return read(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory))
        words = [sys.argv[1], "-W", "ignore", "-m", __spec__.name, "--read", directory]
        return subprocess.run(words, cwd=TOP, check=False).returncode


def write(directory: Path) -> None:
    """Every model with its logits, every tokenizer with its ids."""
    import transformers

    from megatron_btx.evaluate.export import saved_files
    from megatron_btx.families import open_hf
    from megatron_btx.families.export import carried, write_hf
    from megatron_btx.mix.btx import btx
    from megatron_btx.mix.one_model import copy
    from megatron_btx.recipe.schema import Routing
    from tests.families.made import CONFIGS, make
    from tests.families.tokenizers_made import TEXT

    tokens = torch.randint(0, 70, (2, 24), generator=torch.Generator().manual_seed(1))
    expected: dict[str, Any] = {"tokens": tokens, "texts": TEXT, "logits": {}, "ids": {}}
    for name in CONFIGS:
        make(name, directory / "in" / name)
        model = open_hf(directory / "in" / name, "model")
        write_hf(copy(model, dtype=torch.float32), _place(directory, name), known=carried(model))
    for name in MIXES:
        models = [open_hf(directory / "in" / name, label) for label in ("a", "b", "c")]
        plan = btx(models, routing=Routing(), dtype=torch.float32)
        write_hf(plan, _place(directory, f"mix of {name}"))
    for name in (*CONFIGS, *(f"mix of {name}" for name in MIXES)):
        expected["logits"][name] = _logits(_place(directory, name), tokens)
    for name, tokenizer in tokenizers(directory / "made"):
        (directory / "tokenizers" / name).mkdir(parents=True)
        for file, content in partial(saved_files, tokenizer)().items():
            (directory / "tokenizers" / name / file).write_bytes(content)
        expected["ids"][name] = [ids.tolist() for ids in tokenizer.encode(TEXT)]
    torch.save(expected, directory / EXPECTED)
    sys.stdout.write(f"written beside transformers {transformers.__version__}\n")


def tokenizers(directory: Path) -> Iterator[tuple[str, Any]]:
    """As a recipe trains it, Llama 3's and Qwen's."""
    from megatron_btx.data.tokenizer import read_tokenizer
    from megatron_btx.data.tokenizer_sentencepiece import train_tokenizer
    from tests.families.tokenizers_made import TEXT, llama3, qwen

    yield "own", train_tokenizer(TEXT * 20, 400, where="it")
    for make in (llama3, qwen):
        name = make.__name__
        yield name, read_tokenizer(make(directory / name), "huggingface")


def read(directory: Path) -> int:
    """Compare; in the other environment, which has none of ours."""
    import transformers

    expected = torch.load(directory / EXPECTED)
    wrong = 0
    for name, want in expected["logits"].items():
        logits = _logits(_place(directory, name), expected["tokens"])
        difference = float((logits - want).abs().max())
        wrong += difference > 1e-4 and name not in OTHERWISE
        sys.stdout.write(f"{name}: logits {difference:.1e} apart\n")
    for name, want in expected["ids"].items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "tokenizers" / name)
        rows = tokenizer(expected["texts"], add_special_tokens=False)["input_ids"]
        same = sum(one == other for one, other in zip(rows, want, strict=True))
        wrong += same != len(want)
        sys.stdout.write(f"tokenizer {name}: {same} of {len(want)} texts have the same ids\n")
    said = "all of it agrees" if not wrong else f"{wrong} do not agree"
    sys.stdout.write(f"transformers {transformers.__version__}: {said}\n")
    return int(bool(wrong))


def _place(directory: Path, name: str) -> Path:
    """Of a name that ``transformers`` does not complain about."""
    return directory / re.sub(r"\W+", "_", name)


@torch.no_grad()
def _logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits: torch.Tensor = model.eval()(tokens).logits
    return logits


if __name__ == "__main__":
    sys.exit(main())
