"""What an export's tokenizer is in ``transformers``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megatron_btx.data.tokenizer import train_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.evaluate.export import check_ids


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mixtral", "qwen2"])
def test_ids_of_the_tokenizer_that_transformers_makes(model_type: str, tmp_path: Path) -> None:
    """Of a ``qwen2`` AutoTokenizer makes a Qwen2Tokenizer, whatever its files name."""
    pytest.importorskip("transformers")
    texts = [
        f"A line of words, {number} in all.\n    def f(x):  return {number}" for number in range(99)
    ]
    tokenizer = train_tokenizer(texts, 320, where="test")
    tokenizer.save_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ids = [torch.tensor([*row, tokenizer.eos_id]) for row in tokenizer.encode(texts[:3])]
    sequences = [torch.cat(ids), ids[0][:-1]]
    refused = pytest.raises(UserError, match="makes a Qwen2Tokenizer of its tokenizer")
    with refused if model_type == "qwen2" else nullcontext():
        check_ids(tokenizer, sequences, tmp_path)
