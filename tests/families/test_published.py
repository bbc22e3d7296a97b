"""Models with the ``config.json`` of their makers: in and out bit for bit, logits of
``transformers``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.families.hf import read_config
from megatron_btx.recipe.schema import Layout
from tests.families.published import PUBLISHED, UNLIKE
from tests.families.ranks_side import logits
from tests.families.test_families import batch, convert, distance, the_same_model, theirs

transformers = pytest.importorskip("transformers")


def publish(name: str, directory: Path) -> Any:
    """A model of that ``config.json`` with random weights, in fp32."""
    directory.mkdir()
    text = json.dumps(PUBLISHED[name], indent=2)
    (directory / "config.json").write_text(text)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # norms too: ones would hide a swap
            parameter.normal_(0, 0.15)
            if "norm" in key:
                parameter.add_(1)
    model.eval().save_pretrained(directory)
    (directory / "config.json").write_text(text)  # which transformers has rewritten
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_in_and_out(ranks, tmp_path, name):
    original = publish(name, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "out", "hf")
    again = the_same_model(original, tmp_path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, key) == getattr(original.config, key), key
    rope = [dict(model.config.rope_parameters) for model in (original, again)]
    rope[0].pop("type", None)  # an older word for rope_type, which stands beside it
    assert rope[0] == rope[1]
    ((ours, _),) = ranks.run(logits, 1, tmp_path / "megatron", Layout(), batch()[0])
    assert distance(ours, theirs(original)) < 1e-4  # sums in another order: about 1e-6


@pytest.mark.parametrize(("name", "change", "found"), UNLIKE)
def test_a_variant_that_computes_something_else_is_refused(tmp_path, name, change, found):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name] | change))
    with pytest.raises(UserError) as caught:
        read_config(tmp_path)
    assert found in str(caught.value)
