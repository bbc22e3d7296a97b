"""Tiny models whose answers are known, and text for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.engine import cpu
from tests.evaluate import made

cpu.install()  # it must stand in for CUDA before any module of Megatron is imported


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories ``a``, ``b``, ``c`` of random weights, ``uniform``, ``bigram``,
    ``moe`` and ``switch-hf``; Megatron's ``switch``, the same model; ``x.jsonl`` and ``y.jsonl`` of
    two vocabularies."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = made.tokenizer()
    for number, name in enumerate("abc"):
        made.write(made.random_model(tokenizer, number), root / name, tokenizer)
    made.write(made.bigram_model(tokenizer, []), root / "uniform", tokenizer)
    made.write(made.bigram_model(tokenizer, made.CHAINS), root / "bigram", tokenizer)
    made.write(made.moe(tokenizer), root / "moe", tokenizer)
    switch = made.moe(tokenizer, made.SWITCH)
    made.write(switch, root / "switch-hf", tokenizer)
    made.write_megatron(switch, root / "switch", tokenizer)
    for name, texts in made.TEXTS.items():
        lines = [json.dumps({"text": text}) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
