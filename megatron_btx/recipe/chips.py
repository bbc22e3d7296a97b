"""Peak arithmetic of GPUs, and what a plan takes on them: hours, days, money. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_btx.errors import UserError
from megatron_btx.recipe.messages import aligned
from megatron_btx.recipe.run_plan import RunPlan, StagePlan, human

PEAK_TFLOPS: dict[str, float] = {
    # Dense bf16 tensor cores, without sparsity, of the makers' data sheets; V100: fp16.
    "v100": 125.0,
    "a10": 125.0,
    "a30": 165.0,
    "a40": 149.7,
    "a100": 312.0,
    "a800": 312.0,
    "l4": 121.0,
    "l40s": 362.0,
    "rtx 4090": 165.2,
    "rtx a6000": 154.8,
    "h100": 989.0,
    "h100 pcie": 756.0,
    "h100 nvl": 835.0,
    "h800": 989.0,
    "h200": 989.0,
    "gh200": 989.0,
    "b200": 2250.0,
    "gb200": 2500.0,
    "mi250x": 383.0,
    "mi300x": 1307.0,
    "mi325x": 1307.0,
    "mi355x": 2500.0,
}
"""TFLOP/s a GPU by its name, lower case."""

MEMORY_GB: dict[str, int] = {
    **{"v100": 32, "a10": 24, "a30": 24, "a40": 48, "a100": 80, "a800": 80, "l4": 24, "l40s": 48},
    **{"rtx 4090": 24, "rtx a6000": 48, "h100": 80, "h100 pcie": 80, "h100 nvl": 94, "h800": 80},
    **{"h200": 141, "gh200": 144, "b200": 180, "gb200": 186, "mi250x": 128, "mi300x": 192},
    **{"mi325x": 256, "mi355x": 288},
}
"""Memory of the largest variant, by the makers' data sheets, in 10^9 bytes. B200: NVIDIA's guide to
the DGX B200 has 1,440 for eight; GB200: 13.4 TB for the 72 of an NVL72."""

MFU = 0.4
"""Model FLOPs utilisation that a plan counts with: what Megatron-LM reports of Mixtral 8x7B and of
Llama on H100s is 0.40 to 0.47 (its MoE README)."""


def peak_tflops(name: str) -> float | None:
    """Of a GPU as torch or a user calls it; ``None`` of one that is not in the table.

    ``NVIDIA H100 80GB HBM3`` is ``h100``; of several names that are in it the longest counts.
    """
    chip = _chip(name)
    return None if chip is None else PEAK_TFLOPS[chip]


def _chip(name: str) -> str | None:
    words = name.lower().replace("-", " ").replace("_", " ").split()
    return max(
        (chip for chip in PEAK_TFLOPS if _within(chip.split(), words)), key=len, default=None
    )


def too_large(plan: RunPlan, name: str | None) -> list[str]:
    """A line for each stage whose ranks do not fit a GPU of this name; nothing of one that is not
    in the table."""
    chip = None if name is None else _chip(name)
    if chip is None:
        return []
    memory = MEMORY_GB[chip]
    fix = "divide it over more ranks (`layout`), or lower `micro_batch_size`"
    return [
        f"{stage.name} needs {human(stage.memory_per_rank.allocated, 'B')} on a GPU, and {name} "
        f"has {memory}GB: {fix}"
        for stage in plan.stages
        if stage.steps and stage.memory_per_rank.allocated > memory * 1e9
    ]


def _within(chip: list[str], words: list[str]) -> bool:
    """Whether a chip's words are among a name's, in their order; ``A100`` of ``A100 SXM4 80GB``."""
    left = iter(words)
    return all(word in left for word in chip)


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """What something takes."""

    gpu_hours: float
    days: float
    """Of wall time, on the ranks of the recipe's layouts."""
    cost: float | None
    """In the currency of the price; ``None`` without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Of a plan, on one kind of GPU."""

    gpu: str
    peak_tflops: float
    mfu: float
    price: float | None
    """Of an hour of one GPU."""
    stages: dict[str, Time]
    system: Time
    """What makes the system after the seed, as in the paper's table 3: the experts at the same
    time, then the finetuning."""
    total: Time
    """All stages, with the seed and the dense baseline, which trains beside experts and
    finetuning."""


def estimate(plan: RunPlan, gpu: str, mfu: float = MFU, price: float | None = None) -> Estimate:
    """GPU-hours, days and cost of a plan: its model FLOPs over peak times MFU.

    Saves, evaluations and waiting in queues come on top.

    Raises:
        UserError: an unknown GPU, or a number out of range.
    """
    try:
        peak: float | None = float(gpu)
    except ValueError:
        peak = peak_tflops(gpu)
    if peak is None or not 0 < peak < 1e6:
        fix = f"use {', '.join(PEAK_TFLOPS)}, or its peak TFLOP/s as a number"
        raise UserError("--gpu", f"{gpu!r} is not in the table", fix)
    if not 0 < mfu <= 1:
        raise UserError("--mfu", f"is {mfu:g}", "give a share of the peak, 0.4 for example")
    if price is not None and not 0 <= price < 1e6:
        raise UserError("--price", f"is {price:g}", "give the price of a GPU-hour")

    def took(stage: StagePlan) -> Time:
        hours = stage.train_flops / (peak * 1e12 * mfu) / 3600
        return Time(gpu_hours=hours, days=hours / stage.ranks / 24, cost=_cost(hours, price))

    stages = {stage.name: took(stage) for stage in plan.stages}
    own = {name: stages[name] for name in plan.made_by if name in stages}
    days = _days(own)
    whole = stages["seed"].days + max(_days({**stages, "dense": _NOTHING}), _dense(stages))
    return Estimate(
        gpu=gpu,
        peak_tflops=peak,
        mfu=mfu,
        price=price,
        stages=stages,
        system=_sum(own.values(), days, price),
        total=_sum(stages.values(), whole, price),
    )


_NOTHING = Time(gpu_hours=0.0, days=0.0, cost=None)


def _dense(stages: dict[str, Time]) -> float:
    return stages.get("dense", _NOTHING).days


def _days(stages: dict[str, Time]) -> float:
    """Of experts that train side by side, and what comes after them; without the seed's, unless
    there is nothing else."""
    experts = [time.days for name, time in stages.items() if name.startswith("expert:")]
    others = [
        time.days
        for name, time in stages.items()
        if not name.startswith("expert:") and (name != "seed" or len(stages) == 1)
    ]
    return max(experts, default=0.0) + sum(others)


def _sum(times: Iterable[Time], days: float, price: float | None) -> Time:
    hours = sum(time.gpu_hours for time in times)
    return Time(gpu_hours=hours, days=days, cost=_cost(hours, price))


def _cost(hours: float, price: float | None) -> float | None:
    return None if price is None else hours * price


def render(found: Estimate) -> str:
    """As plain text."""
    head = [
        "stage",
        "GPU-hours",
        "GPU-days",
        "days",
        *(["cost"] if found.price is not None else []),
    ]
    named = {**found.stages, "the system": found.system, "all stages": found.total}
    table = [head, *([name, *_cells(time)] for name, time in named.items())]
    said = (
        f"On {found.gpu} ({found.peak_tflops:g} TFLOP/s peak) at {found.mfu:.0%} MFU; days of wall "
        "time on the layouts' ranks, the experts side by side. Saves, evaluations and queues come "
        "on top."
    )
    return "\n".join([*aligned(table), "", said])


def _cells(time: Time) -> list[str]:
    cells = [human(time.gpu_hours), f"{time.gpu_hours / 24:,.1f}", f"{time.days:,.2f}"]
    return cells if time.cost is None else [*cells, f"{time.cost:,.0f}"]
