"""A stage's numbers (train/summary.py) as the cells of tables, for ``btx status --numbers`` and the
report page. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_btx.recipe.messages import aligned, amount, clock
from megatron_btx.train import goodput
from megatron_btx.train.summary import P50, P95

Values = Mapping[str, float]
Column = tuple[str, Callable[[Values], str]]
"""Its head, and what it says of a stage's numbers."""

NONE = "–"
"""Of what is not logged."""


def cells(columns: Sequence[Column], values: Values) -> list[str]:
    """What a table says of one stage."""
    return [cell(values) for _, cell in columns]


def short(seconds: float) -> str:
    """``35 ms``, ``1.25 s``."""
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _of(name: str, shown: Callable[[float], str]) -> Callable[[Values], str]:
    return lambda values: shown(values[name]) if name in values else NONE


def _share(part: str) -> Callable[[Values], str]:
    """Of the step's time."""
    name = f"time_metrics/{part}(s)"
    return lambda values: f"{values[name] / values[P50]:.0%}" if name in values else NONE


def _memory(*names: str) -> Callable[[Values], str]:
    """The first of these that is logged: which, follows from the device."""

    def cell(values: Values) -> str:
        found = [values[key] for name in names if (key := f"memory/{name}(GiB)") in values]
        return f"{found[0]:.2f} GiB" if found else NONE

    return cell


def _transfer(what: str) -> Callable[[Values], str]:
    seconds, speed = f"train/checkpoint_{what}_duration_s", f"train/checkpoint_{what}_GBps"

    def cell(values: Values) -> str:
        if seconds not in values:
            return NONE
        said = f"{short(values[seconds])}, {values[speed]:.2g} GB/s"
        waited = values.get(f"train/checkpoint_{what}_stall_s")
        return said if waited is None else f"{said}, {short(waited)} waited"

    return cell


def percent(share: float) -> str:
    """``41.3%``."""
    return f"{share:.1%}"


SPEED: tuple[Column, ...] = (
    ("tokens/s per GPU", _of("throughput/device/TPS", amount)),
    ("TFLOP/s per GPU", _of("throughput/device/flopsPS", lambda flops: f"{flops / 1e12:.3g}")),
    ("MFU", _of("throughput/device/MFU", percent)),
    ("step p50", _of(P50, short)),
    ("step p95", _of(P95, short)),
    ("data", _share("data_loading")),
    ("forward, backward", _share("forward_backward")),
    ("optimizer", _share("optimizer")),
    ("evaluation", _of("time_metrics/evaluation(s)", short)),
    ("memory", _memory("max_active", "max_resident")),
    ("reserved", _memory("max_reserved")),
    ("save", _transfer("save")),
    ("load", _transfer("load")),
)
"""Medians over the steps; ``data`` and the two after it are shares of a step's time."""

WALL: tuple[Column, ...] = (
    ("wall time", _of("goodput/wall(s)", clock)),
    ("goodput", _of("goodput/share", percent)),
    *((kind, _of(f"goodput/{kind}(s)", short)) for kind in goodput.KINDS[1:]),
)
"""Where the wall time went, over all attempts."""

_EVENNESS = {
    "utilisation min": "expert_utilization_min",
    "p25": "expert_utilization_p25",
    "median": "expert_utilization_median",
    "p75": "expert_utilization_p75",
    "max": "expert_utilization_max",
    "cv": "cv",
    "diversity": "expert_diversity",
    "dead": "dead_expert_frac",
}
"""Head -> name in ``routing_stats.of_layer``."""


def experts(evenness: Mapping[str, Sequence[Values]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of how evenly the experts are used, by domain and layer.

    Args:
        evenness: as ``routing_stats.by_layer`` says it.
    """
    rows = [
        [domain, str(number), *(f"{layer[name]:.2f}" for name in _EVENNESS.values())]
        for domain, layers in evenness.items()
        for number, layer in enumerate(layers, 1)
        if layer
    ]
    return ["domain", "layer", *_EVENNESS], rows


def tables(stages: Mapping[str, Values]) -> list[tuple[list[str], list[list[str]]]]:
    """Head and rows of each table that has something to say, a row a stage.

    Args:
        stages: their numbers by name.
    """
    found = []
    for columns, asked in ((SPEED, P50), (WALL, "goodput/share")):
        rows = [
            [name, *cells(columns, values)] for name, values in stages.items() if asked in values
        ]
        if rows:
            found.append((["stage", *(head for head, _ in columns)], rows))
    return found


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    return "\n".join(aligned([head, *rows])) + "\n"
