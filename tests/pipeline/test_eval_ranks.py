"""Ranks outside of any run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.schema import Layout


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_number_of_ranks_that_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv({"WORLD_SIZE": "RANK"}.get(name, "SLURM_PROCID"), "0")
    monkeypatch.setenv(name, "four")
    with pytest.raises(UserError, match=f"{name}: is 'four'\n  fix: give a whole number"):
        eval_ranks.answer({"what": "data", "layout": dataclasses.asdict(Layout()), "subjects": []})
