"""Documents kept apart within a sequence, against Megatron's own masks and each document alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_btx.data.boundaries import Boundaries, check_attention, document_begins
from megatron_btx.data.heldout_sequences import held_out
from megatron_btx.data.mixture import stage_data
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.engine.platform import Platform
from megatron_btx.errors import UserError
from megatron_btx.evaluate.heldout_loss import text_of
from megatron_btx.recipe.schema import Recipe
from tests.engine.harness import DENSE, set_weights
from tests.ranks import Ranks

BOTH = {"reset_attention_mask": True, "eod_mask_loss": True}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_as_megatron_masks(ids: list[int]) -> None:
    tokens = torch.tensor(ids)
    mask, loss, positions = _get_ltor_masks_and_position_ids(tokens, 3, True, True, True, True)
    begins, place = document_begins(tokens, 3), torch.arange(len(ids))
    assert torch.equal(place - begins, positions)
    seen = (place <= place.unsqueeze(1)) & (place >= begins.unsqueeze(1))
    assert torch.equal(~seen, mask[0])
    sample = {"tokens": tokens, "loss_mask": torch.ones(len(ids))}
    marked = Boundaries(eos_id=3, **BOTH).marked(sample)
    assert torch.equal(marked["loss_mask"], loss)
    assert torch.equal(marked["document_begins"], begins)
    assert torch.equal(sample["loss_mask"], torch.ones(len(ids)))
    assert Boundaries(eos_id=3).marked(sample) == sample


def with_boundaries(recipe: Recipe, **values: bool) -> Recipe:
    blocks = {name: dataclasses.replace(getattr(recipe, name), **values)
              for name in ("seed", "finetune", "dense")}  # fmt: skip
    experts = {name: dataclasses.replace(block, **values) for name, block in recipe.experts.items()}
    return dataclasses.replace(recipe, experts=experts, **blocks)


def test_what_stages_and_evaluations_read(prepared: tuple[Recipe, Path]) -> None:
    """The same samples in the same order, with the ends of documents marked."""
    recipe, run_dir = prepared
    eos = load_tokenizer(run_dir / "prepare" / "tokenizer").eos_id
    marked = with_boundaries(recipe, **BOTH)
    pairs = [
        (plain, with_marks)
        for step in range(3)
        for plain, with_marks in zip(
            stage_data(recipe, "finetune", run_dir).batches(step, 0),
            stage_data(marked, "finetune", run_dir).batches(step, 0),
            strict=True,
        )
    ]
    texts = (held_out(recipe, run_dir, 4096), held_out(marked, run_dir, 4096))
    for name in recipe.domains:
        pairs += list(zip(*(text[name] for text in texts), strict=True))
    for plain, with_marks in pairs:
        for key in plain:
            if key != "loss_mask":
                assert torch.equal(plain[key], with_marks[key])
        assert set(with_marks) - set(plain) == {"document_begins"}
        assert torch.equal(with_marks["loss_mask"] == 0, plain["tokens"] == eos)
        assert torch.equal(with_marks["document_begins"], document_begins(plain["tokens"], eos))
    assert any((one["loss_mask"] == 0).any() for _, one in pairs)
    assert held_out(marked, run_dir, 4096, plain=True)["code"][0].keys() == pairs[-1][0].keys()
    identities = [
        text_of(held_out(with_boundaries(recipe, **values), run_dir, 4096))["code"]["sha256"]
        for values in ({}, {"reset_attention_mask": True}, {"eod_mask_loss": True}, BOTH)
    ]
    assert len(set(identities)) == 4  # losses of one are not compared with another's


def packed_and_alone() -> tuple[Any, Any]:
    """Logits of three documents in a sequence, and of each by itself."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.recipe.schema import Layout

    distributed.initialize(Layout(), 7)
    model = build_model(DENSE, Layout(), "fp32", random_seed=7).eval()
    set_weights(model)
    ids = torch.randint(2, 120, (16,), generator=torch.Generator().manual_seed(5))
    ids[[4, 5]] = 1  # the second document is an end token alone
    documents = [ids[:5], ids[5:6], ids[6:]]

    def logits(tokens: Any, begins: Any) -> Any:
        place = torch.arange(len(tokens)).unsqueeze(0)
        return model(tokens.unsqueeze(0), place, attention_mask=begins)[0]

    with torch.no_grad():
        together = logits(ids, document_begins(ids.unsqueeze(0), 1))
        return together.numpy(), torch.cat([logits(one, None) for one in documents]).numpy()


def test_a_document_in_a_sequence_is_a_document_alone(ranks: Ranks) -> None:
    """Though its positions do not begin anew: rotary positions count by their differences. What is
    left are roundings of fp32 angles, 1e-6 of the logits."""
    ((together, alone),) = ranks.run(packed_and_alone, 1)
    assert abs(together - alone).max() < 1e-5 * abs(alone).max()


def test_transformer_engine_is_refused() -> None:
    check_attention(Platform(cuda=True, transformer_engine=False, apex=False))
    check_attention(Platform(cuda=False, transformer_engine=True, apex=False))
    with pytest.raises(
        UserError, match="reset_attention_mask: is not supported with Transformer Engine"
    ):
        check_attention(Platform(cuda=True, transformer_engine=True, apex=False))
