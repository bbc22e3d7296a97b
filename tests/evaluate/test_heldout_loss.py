"""Held-out losses and routing: every sequence counts, in any micro-batch and layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.evaluate.evaluate_stage import _measured
from megatron_btx.evaluate.heldout_loss import HeldOut, text_of
from megatron_btx.evaluate.packed_text import PackedText
from megatron_btx.evaluate.results import SystemResult
from megatron_btx.recipe.schema import Layout
from megatron_btx.recipe.systems import TableRow
from tests.evaluate import made, ranks_side
from tests.ranks import Ranks

SEQUENCES = 50
LENGTH = 16
DP2, EP2 = Layout(data_parallel_size=2), Layout(data_parallel_size=2, expert_model_parallel_size=2)
TP2 = Layout(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = Layout(pipeline_model_parallel_size=2)
CASES = [(16, Layout()), (20, Layout()), (16, DP2), (32, Layout())]


def text() -> PackedText:
    """Its last sequence ends in tokens that do not count."""
    documents = [text for _ in range(3) for text in made.TEXTS["x"] + made.TEXTS["y"]]
    spoken = made.tokenizer()
    tokens = SEQUENCES * LENGTH - 5
    whole = PackedText(documents, spoken, LENGTH, start_id=spoken.eos_id)
    assert whole.size.tokens > tokens
    whole._ids = whole._ids[: SEQUENCES * LENGTH + 1]
    whole.size = whole.size.__class__(documents=1, tokens=tokens, bytes=1)
    return whole


def test_a_dense_model_against_transformers(here: Path, ranks: Ranks) -> None:
    """The mean over all tokens that count, computed sequence by sequence in float64."""
    total = tokens = 0.0
    for place in range(SEQUENCES):
        one = text()[place]
        log_probs = made.log_probs(here / "a", one["tokens"].tolist())
        each = log_probs.gather(1, one["labels"][:, None])[:, 0] * one["loss_mask"]
        total, tokens = total - each.sum().item(), tokens + one["loss_mask"].sum().item()
    assert tokens == SEQUENCES * LENGTH - 5
    for size, layout in CASES:
        found = ranks.run(ranks_side.evaluate, layout.world_size, here / "a", layout, text(), size)
        assert found[-1].loss["t"] == pytest.approx(total / tokens, abs=2e-6)


@pytest.mark.parametrize("model", ["moe", "switch"])
def test_the_same_in_any_micro_batch_and_layout(here: Path, ranks: Ranks, model: str) -> None:
    """Of Switch too, which in training drops half of these tokens, other ones in other batches."""
    runs = [
        ranks.run(ranks_side.evaluate, layout.world_size, here / model, layout, text(), size)[-1]
        for size, layout in [*CASES, (7, EP2), (13, TP2), (49, PP2)]
    ]
    first = runs[0]
    for load in (first.load["t"], first.gate["t"]):
        assert torch.tensor(load).sum(1) == pytest.approx([1.0, 1.0], abs=1e-5)
    for other in runs[1:]:
        assert other.loss["t"] == pytest.approx(first.loss["t"], abs=1e-6)
        for key in ("load", "gate"):
            ours, theirs = (torch.tensor(getattr(run, key)["t"]) for run in (first, other))
            torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


def test_the_identity_of_a_text() -> None:
    """Every id, where sequences begin, and what counts."""
    first = text_of({"t": text()})["t"]
    assert first["tokens"] == SEQUENCES * LENGTH - 5
    rows = [text()[place] for place in range(SEQUENCES)]
    assert text_of({"t": rows})["t"] == first
    for key in ("labels", "loss_mask"):
        changed = [dict(row) for row in rows]
        changed[9][key] = 1 - changed[9][key]
        assert text_of({"t": changed})["t"]["sha256"] != first["sha256"]
    assert text_of({"t": rows[:-1]})["t"] != first


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["loss", "load", "gate"])
def test_what_the_reader_of_results_refuses_is_not_written(of: str, value: float) -> None:
    """The evaluation stage looks at every system so, before it keeps or writes anything."""
    loss, share = {"a": 1.0, "b": 2.0, "mean": 1.5}, {"a": [[0.5, 0.5]], "b": [[0.5, 0.5]]}
    good: dict[str, Any] = {"loss": loss, "load": share, "gate": share}
    row = TableRow(name="btx", models=("finetune",), made_by=("finetune",))
    architecture = made.moe(made.tokenizer(), names="xy").architecture
    measured = _measured(row, architecture, HeldOut(**good))
    assert SystemResult.from_json("btx", measured.to_json(), "") is not None
    bad = {**good, of: {**good[of], "b": value if of == "loss" else [[0.5, value]]}}
    if of == "loss":
        bad["loss"]["mean"] = value  # as it is computed of them
    with pytest.raises(UserError, match="btx: computes NaN or infinity on the text of b:"):
        _measured(row, architecture, HeldOut(**bad))
    with pytest.raises(UserError, match="is damaged"):
        SystemResult.from_json("btx", replace(measured, **bad).to_json(), "")
