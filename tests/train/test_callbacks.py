"""Intervals of the callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_btx.recipe.schema import Training
from megatron_btx.train.callbacks import CheckReplicas


def test_replicas_are_never_checked_at_interval_0() -> None:
    run: Any = SimpleNamespace(step=1, total_steps=1, stopped=True)  # and no model to look at
    CheckReplicas(Training(check_replicas_interval=0)).after_step(run, {})
