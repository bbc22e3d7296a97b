"""Which stages ``btx submit`` submits. Imports no torch, and asks no Slurm."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.graph import Stage


def select(
    stages: tuple[Stage, ...],
    *,
    only: Iterable[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> tuple[Stage, ...]:
    """The stages that are selected.

    Args:
        only: these, by stage (``expert:math``) or kind (``expert``).
        first: this one and all that wait for it.
        last: this one and all that it waits for.

    Raises:
        UserError: there is no such stage.
    """
    chosen = {stage.name for stage in stages}
    only = tuple(only)
    if only:
        chosen = {name for asked in only for name in _named(stages, asked, "--only")}
    if first is not None:
        behind = _named(stages, first, "--from")
        for stage in stages:
            if behind.intersection(stage.needs):
                behind.add(stage.name)
        chosen &= behind
    if last is not None:
        before: set[str] = set()
        for name in _named(stages, last, "--stop-after"):
            before |= {stage.name for stage in graph.until(stages, name)}
        chosen &= before
    return tuple(stage for stage in stages if stage.name in chosen)


def _named(stages: tuple[Stage, ...], asked: str, option: str) -> set[str]:
    names = {stage.name for stage in stages if asked in (stage.name, stage.name.partition(":")[0])}
    if not names:
        raise graph.no_stage(asked, [stage.name for stage in stages], option)
    return names


def check_needs(run_dir: Path, stages: tuple[Stage, ...], chosen: tuple[Stage, ...]) -> None:
    """That everything a chosen stage waits for is done or chosen too.

    Raises:
        UserErrors: all that is missing.
    """
    coming = {stage.name for stage in chosen}
    errors = []
    for stage in chosen:
        needs = state.missing(run_dir, graph.read_by(stage, stages))
        missing = [need.name for need in needs if need.name not in coming]
        if missing:
            what = f"needs {', '.join(missing)}, not done and not among what is submitted"
            errors.append(UserError(stage.name, what, "select those as well"))
    if errors:
        raise UserErrors(errors)
