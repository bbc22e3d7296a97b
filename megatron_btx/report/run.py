"""What is left of a recipe, run on this machine, its page written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, run_checks, state
from megatron_btx.pipeline.fingerprint import Memo
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import runner
from megatron_btx.pipeline.local.progress import view
from megatron_btx.pipeline.local.runner import Outcome
from megatron_btx.pipeline.slurm import submit
from megatron_btx.recipe.load import dump
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report import page


def run_left(
    recipe: Recipe, run_dir: Path, stages: tuple[Stage, ...], *, share: Sequence[str] = ()
) -> Outcome:
    """Run the stages that are not done.

    Args:
        recipe: what is to be run.
        run_dir: the recipe's.
        stages: of its graph, each with all that it needs.
        share: other runs' directories, besides those that the recipe names.

    Raises:
        UserError: the input is wrong, jobs are at work in the directory, or another run is.
    """
    submit.refuse_beside_jobs(run_dir.absolute(), stages)
    run_checks.check(recipe, run_dir, state.left(run_dir, stages), len(runner.gpus()))
    for line in run_checks.warnings(recipe):
        sys.stderr.write(f"warning: {line}\n")
    absolute = dataclasses.replace(recipe, run_dir=str(run_dir.absolute()))
    try:
        with _page_kept_current(recipe, run_dir):
            outcome = runner.run(
                stages,
                run_dir,
                dump(absolute),
                view=view(),
                max_parallel=recipe.max_parallel_jobs,
                inline={"report": lambda: page.write(recipe, run_dir)},
                share=(*recipe.share, *share),
            )
    except OSError as error:
        if error.filename is None:  # a write that failed does not know whose file it was
            error.filename = str(run_dir)
        raise
    if run_dir.is_dir() and outcome.finished:
        memo = Memo(run_dir / "fingerprints.json")
        graph.build(recipe, memo)
        memo.save()
    return outcome


@contextlib.contextmanager
def _page_kept_current(recipe: Recipe, run_dir: Path) -> Iterator[None]:
    """Within it ``report.html`` is written anew as often as it loads itself again. The page is no
    part of the run: what goes wrong with it is left to the end, when it is written as a stage."""
    ended = threading.Event()
    stages = graph.build(recipe, Memo(run_dir / "fingerprints.json"))

    def keep() -> None:
        while not ended.wait(page.REFRESH):
            if run_dir.is_dir():
                with contextlib.suppress(OSError, UserError):
                    page.write(recipe, run_dir, stages)

    thread = threading.Thread(target=keep, name="report.html", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
