"""``btx run``: checks a recipe and runs its unfinished stages on this machine, with the report page
kept current. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, run_checks, state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local import run_stages
from megatron_btx.pipeline.local.progress import view
from megatron_btx.pipeline.local.run_stages import Outcome
from megatron_btx.pipeline.slurm import submit
from megatron_btx.recipe.load import dump_kept
from megatron_btx.recipe.schema import Recipe


def run_recipe(
    recipe: Recipe,
    run_dir: Path,
    stages: tuple[Stage, ...],
    *,
    page: Callable[[Recipe, Path, Sequence[Stage]], object],
    refresh: float,
    share: Sequence[str] = (),
) -> Outcome:
    """Run the stages that are not done.

    Args:
        recipe: what is to be run.
        run_dir: the recipe's.
        stages: of its graph, each with all that it needs.
        page: the stage ``report``: writes the page of a recipe's run in a directory.
        refresh: seconds after which the page is written anew while stages run.
        share: other runs' directories, besides those that the recipe names.

    Raises:
        UserError: the input is wrong, jobs are at work in the directory, or another run is.
    """
    submit.refuse_beside_jobs(run_dir.absolute(), stages)
    left, gpus = state.left(run_dir, stages), len(run_stages.gpus())
    run_checks.check(recipe, run_dir, left, gpus)
    shared = (*recipe.share, *share)
    own = tuple(one for one in left if state.find_shared(run_dir, one, shared) is None)
    crowded = () if gpus else run_checks.crowded(own, run_stages.cores())
    for line in (*run_checks.warnings(recipe), *crowded):
        sys.stderr.write(f"warning: {line}\n")
    every = graph.of_run(recipe, run_dir)

    def written() -> object:
        return page(recipe, run_dir, every)

    try:
        with _kept_current(written, run_dir, refresh):
            outcome = run_stages.run(
                stages,
                run_dir,
                dump_kept(recipe, run_dir),
                view=view(),
                max_parallel=recipe.max_parallel_jobs,
                inline={"report": written},
                share=shared,
            )
    except OSError as error:
        if error.filename is None:  # a write that failed does not know whose file it was
            error.filename = str(run_dir)
        raise
    if outcome.finished:
        graph.of_run(recipe, run_dir)  # nothing is read again (keys.py): the memo is kept
    return outcome


@contextlib.contextmanager
def _kept_current(page: Callable[[], object], run_dir: Path, seconds: float) -> Iterator[None]:
    """Within it the page is written anew as often as it loads itself again. It is no part of the
    run: what goes wrong with it is left to the end, when it is written as a stage."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(seconds):
            if run_dir.is_dir():
                with contextlib.suppress(OSError, UserError):
                    page()

    thread = threading.Thread(target=keep, name="report.html", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
