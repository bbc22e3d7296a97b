"""What ``btx status`` shows of a stage, and how. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_btx.pipeline import stage_tables
from megatron_btx.recipe.messages import aligned, amount

COLUMNS = ("stage", "job", "state", "nodes", "step", "loss", "tokens/s", "MFU", "goodput", "left",
           "restarts")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStatus:
    """One stage."""

    stage: str
    job: str = ""
    state: str = ""
    """Slurm's word for its job, or ``held``; else as of ``state.statuses``."""
    nodes: str = ""
    step: str = ""
    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    """Model FLOPs utilisation of the last step, of 1."""
    left: str = ""
    """Until the last step at the present pace; and the job's time limit, where it comes before."""
    restarts: int = 0
    active: bool = False
    """Whether its job is in the queue."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Of the stage so far (train/summary.py)."""
    slow_ranks: Mapping[str, float] = field(default_factory=dict)
    """By ``RANK@HOST``: how many times as long as the median rank it works."""
    experts: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Of an MoE: how evenly its experts are used, by domain and layer."""
    note: str = ""
    """Why it waits, or the last thing that a failed one said."""

    @property
    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        loss = "" if self.loss is None else f"{self.loss:.3f}"
        speed = amount(self.tokens_per_second) if self.tokens_per_second else ""
        restarts = str(self.restarts) if self.restarts else ""
        where = (self.stage, self.job, self.state, self.nodes)
        mfu = "" if self.mfu is None else stage_tables.percent(self.mfu)
        share = self.numbers.get("goodput/share")
        goodput = "" if share is None else stage_tables.percent(share)
        return (*where, self.step, loss, speed, mfu, goodput, self.left, restarts)


def table(found: list[StageStatus]) -> str:
    """The rows as text, what there is to say about one under it."""
    cells = [COLUMNS, *(row.cells for row in found)]
    lines = []
    for line, row in zip(aligned(cells, len(COLUMNS)), [None, *found], strict=True):
        lines.append(line)
        if row is not None and row.note:
            lines += [f"    {text}" for text in row.note.splitlines()]
    return "\n".join(lines) + "\n"


def numbers_text(found: list[StageStatus]) -> str:
    """What the stages' logs say of speed, of the wall time and of the experts' use, as tables."""
    tables = stage_tables.tables({row.stage: row.numbers for row in found})
    tables += [stage_tables.experts(row.experts) for row in found if row.experts]
    return "\n".join(stage_tables.columns(head, rows) for head, rows in tables)
