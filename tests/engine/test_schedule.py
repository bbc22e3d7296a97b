"""Every ``lr_decay_style`` of Megatron's, step by step against its formula and against the schedule
that Megatron-LM's trainer would make of the same arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_btx.engine.optimizer import build_schedule
from megatron_btx.recipe.schema import Training

STEPS, WARMUP, DECAY, BATCH = 20, 4, 6, 8
PEAK, LAST = 1e-3, 1e-5

FALL: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "exponential": lambda share: 2 * 0.5**share - 1,
    "minus_sqrt": lambda share: 1 - math.sqrt(share),
}
"""Share of the decay that is over -> share of the way from the last rate to the peak."""
STYLES = [(style, "exponential") for style in get_args(get_type_hints(Training)["lr_decay_style"])]
STYLES += [("WSD", fall) for fall in get_args(get_type_hints(Training)["lr_wsd_decay_style"])[1:]]


def expected(style: str, fall: str, step: int) -> float:
    if step <= WARMUP:
        return PEAK * step / WARMUP
    if style == "constant":
        return PEAK
    if style == "inverse-square-root":
        return max(LAST, PEAK * math.sqrt(WARMUP / step))
    begin, length = (STEPS - DECAY, DECAY) if style == "WSD" else (WARMUP, STEPS - WARMUP)
    share = max(0.0, (step - begin) / length)
    return LAST + (PEAK - LAST) * FALL[fall if style == "WSD" else style](share)


@pytest.mark.parametrize(("style", "fall"), STYLES)
def test_rates(style: str, fall: str) -> None:
    training = Training(
        lr=PEAK,
        min_lr=LAST,
        lr_warmup_iters=WARMUP,
        lr_decay_style=style,  # type: ignore[arg-type]
        lr_wsd_decay_style=fall,  # type: ignore[arg-type]
        lr_wsd_decay_iters=DECAY if style == "WSD" else None,
    )
    ours, theirs = (SimpleNamespace(param_groups=[{}]) for _ in range(2))
    schedule = build_schedule(ours, training, STEPS)  # type: ignore[arg-type]
    trainers = OptimizerParamScheduler(  # counts samples
        theirs,  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=PEAK,
        min_lr=LAST,
        lr_warmup_steps=WARMUP * BATCH,
        lr_decay_steps=STEPS * BATCH,
        lr_decay_style=style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=STEPS * BATCH,
        wd_incr_style="constant",
        wsd_decay_steps=DECAY * BATCH,
        lr_wsd_decay_style=fall,
    )
    for step in range(STEPS + 1):
        rate = ours.param_groups[0]["lr"]
        assert rate == pytest.approx(expected(style, fall, step), rel=1e-12)
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        schedule.step(1)
        trainers.step(BATCH)
