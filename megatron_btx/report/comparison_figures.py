"""The figures of a comparison: mean held-out loss against the cost of a system."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from megatron_btx.evaluate.results import MEAN
from megatron_btx.report.comparison import Comparison, System
from megatron_btx.report.figure_svg import Axes, Dot, Line, Point, power_of_ten
from megatron_btx.report.html import series

_STYLES = {"btx": "btx-line", "dense": "dense-line", "seed": "seed-line"}
_OTHERS = ("experts", "upcycling", "btm")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a system costs, on one axis."""

    key: str
    """``compute``, ``time`` or ``inference``."""
    title: str
    said: str
    """Below the picture."""
    of: Callable[[System], float | None]
    """``None``: not known."""
    axis: str
    """The axis' label, without its unit."""
    unit: Callable[[float], tuple[float, str]]
    """Of the largest cost: by what costs are divided, and how that is called."""


def _flops(top: float) -> tuple[float, str]:
    exponent = math.floor(math.log10(top)) if top else 0
    return 10.0**exponent, f"{power_of_ten(exponent)} FLOPs"


def _time(top: float) -> tuple[float, str]:
    """Hours, minutes or seconds."""
    units = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return next((one for one in units if top >= 2 * one[0]), units[-1])


def _after_the_seed(cost: Callable[[System], float | None]) -> Callable[[System], float | None]:
    """The seed has cost nothing after itself."""
    return lambda system: 0.0 if system.system == "seed" else cost(system)


COSTS = (
    Cost(
        key="compute",
        title="Score against training compute",
        said="all training FLOPs after the seed",
        of=_after_the_seed(lambda system: system.result.train_flops),
        axis="training compute after the seed",
        unit=_flops,
    ),
    Cost(
        key="time",
        title="Score against training time",
        said="the measured time of all training steps after the seed, times their ranks: without "
        "starts of processes, evaluations, saves and mixing",
        of=_after_the_seed(lambda system: system.train_seconds),
        axis="training time after the seed",
        unit=_time,
    ),
    Cost(
        key="inference",
        title="Score against inference compute",
        said="the FLOPs of a forward pass per token",
        of=lambda system: system.result.inference_flops_per_token,
        axis="inference compute per token",
        unit=_flops,
    ),
)


def drawn(comparison: Comparison, cost: Cost) -> list[System]:
    """The systems of a picture. Single experts are left out: they are parts of a system; so are
    systems whose cost is not known."""
    return [
        system
        for system in comparison.systems
        if system.system != "experts" and cost.of(system) is not None
    ]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto frontier of (cost, loss), by rising cost: the points for which no other is as good
    in both and better in one."""
    found: list[Point] = []
    for point in sorted(set(points)):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def point(system: System, cost: Cost) -> Point:
    """Cost and mean score."""
    return float(cost.of(system) or 0.0), system.loss[MEAN]


def dot(system: System, cost: Cost, style: str, *, strong: bool = True) -> Dot:
    """A system in a picture; ``style`` its colour's CSS class."""
    x, y = point(system, cost)
    spread = system.spread.get(MEAN, 0.0)
    return Dot(label=system.name, x=x, y=y, style=style, spread=spread, strong=strong)


def axes(cost: Cost, dots: Sequence[Dot], least: float, name: str) -> Axes:
    """For dots of mean scores, from the cost ``least`` on; ``name``: what the picture shows."""
    top = max((dot.x for dot in dots), default=0.0)
    scale, unit = cost.unit(top)
    low = min((dot.y - dot.spread for dot in dots), default=0.0)
    high = max((dot.y + dot.spread for dot in dots), default=1.0)
    margin = 0.06 * (high - low or 1.0)
    return Axes(
        x_range=(least, top if top > least else least + scale),
        y_range=(low - margin, high + margin),
        x_label=f"{cost.axis} ({unit})",
        y_label="mean held-out loss (nats/token)",
        name=name,
        width=660,
        height=max(340, 60 + 22 * len(dots)),
        left=60,
        right=100,
        x_unit=scale,
    )


def picture(comparison: Comparison, cost: Cost) -> Markup:
    """Mean score of every system against a cost, with the frontier as a stair, as SVG."""
    systems = drawn(comparison, cost)
    best = frontier([point(system, cost) for system in systems])
    dots = [
        dot(system, cost, _style(system), strong=point(system, cost) in best) for system in systems
    ]
    made = axes(cost, dots, 0.0, f"{cost.title}: mean held-out loss of every system")
    made.line(Line(label="frontier", points=_stair(best, made.x_range[1]), style="frontier"))
    made.dots(dots)
    return made.render()


def _stair(best: Sequence[Point], top: float) -> list[Point]:
    """What can be had for at most a cost: level until the next of the frontier."""
    found: list[Point] = []
    for x, y in best:
        if found:
            found.append((x, found[-1][1]))
        found.append((x, y))
    return [*found, (top, found[-1][1])] if found else []


def _style(system: System) -> str:
    if system.system in _STYLES:
        return _STYLES[system.system]
    return series(_OTHERS.index(system.system))
