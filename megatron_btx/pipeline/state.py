"""What of a run is done and what is left, read from its directory alone. Imports no torch.

<run_dir>/lock              held by the ``btx run`` or ``btx submit`` at work (locks.py)
<run_dir>/<stage>/lock      held, shared, by every process of the stage's ranks
<run_dir>/<stage>/stage.json    {"key": ...}: what the directory's content is being made for
<run_dir>/<stage>/attempts.jsonl    one line a start
<run_dir>/<stage>/done.json     the stage is finished, for the key in it
<run_dir>/<stage>/stopped.json  it was stopped and has saved
<run_dir>/<stage>/error.json    why it failed
<run_dir>/<stage>/leave.json    asks ranks that outlived their job to save and end
<run_dir>/old/<stage>-<key>/    what was made for another recipe, kept and brought back if asked
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.data.tokenized import all_tokenized
from megatron_btx.errors import UserError
from megatron_btx.files import append_line, find_json, newest_step, seen_from_here, write_json
from megatron_btx.pipeline import graph
from megatron_btx.pipeline.graph import Stage
from megatron_btx.provenance import code_revision, versions
from megatron_btx.train.goodput import read_attempts

LEAVE = "leave.json"

EXIT_STOPPED = 75
"""Exit code of a rank that was stopped and has saved (``EX_TEMPFAIL``)."""


def done(run_dir: Path, stage: Stage) -> dict[str, Any] | None:
    """The stage's ``done.json`` if it is finished for the key that the recipe asks for. A look
    ahead at another stage, which has that one's key, is over when that one is.

    Raises:
        UserError: it is damaged.
    """
    for name in (stage.directory, *graph.LOOKS_AHEAD.get(stage.kind, "").split()):
        path = run_dir / name / "done.json"
        record = find_json(path)
        if record is not None and record.get("key") == stage.key:
            if wrong := _damage(record):
                fix = "remove it; the stage then goes on from its last checkpoint"
                raise UserError(str(path), f"is damaged: {wrong}", fix)
            outputs = record.get("outputs", {})
            return record if _has_what_it_made(run_dir, stage, outputs) else None
    return None


def _damage(record: dict[str, Any]) -> str:
    """Which entry of a ``done.json`` cannot be what a stage wrote; empty: none."""
    for name in ("outputs", "versions"):
        if not isinstance(record.get(name, {}), dict):
            return f"`{name}` is not a mapping"
    for name in ("seconds", "finished"):
        value = record.get(name, 0.0)
        if type(value) not in (int, float) or not 0 <= value < 1e11:
            return f"`{name}` is not a number of seconds"
    return ""


def _has_what_it_made(run_dir: Path, stage: Stage, outputs: dict[str, Any]) -> bool:
    """Whether what a stage left for others is still there, of what it makes again by itself: a
    table in seconds, token files that were removed."""
    if stage.kind == "prepare" and "domains" in outputs:
        directory = run_dir / stage.directory
        tokenizer = (directory / "tokenizer" / "made.json").is_file()
        return tokenizer and all_tokenized(directory / "data", outputs["domains"])
    table = outputs.get("results")
    return table is None or (run_dir / str(table)).exists()


def left(run_dir: Path, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """The stages of a run that are not done. One behind an unfinished one is not done either,
    unless its own key, which holds the other's, says that it was made from the very same thing.
    Token files that were removed when all that reads them was done are not made again."""
    found = missing(run_dir, stages)
    if len(stages) > 1 and all(_has_been(run_dir, stage) for stage in found):
        return tuple(stage for stage in found if stage.kind != "prepare")
    return found


def missing(run_dir: Path, needs: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Those of the stages that another one needs which are not done."""
    return tuple(stage for stage in needs if done(run_dir, stage) is None)


def _has_been(run_dir: Path, stage: Stage) -> bool:
    """Whether a stage has been done, whatever is left of what it made."""
    record = find_json(run_dir / stage.directory / "done.json")
    return stage.kind == "prepare" and record is not None and record.get("key") == stage.key


def statuses(
    run_dir: Path, stages: tuple[Stage, ...], share: Sequence[str] = ()
) -> dict[str, tuple[str, str]]:
    """How each of a run's stages stands, by name, and what there is to say of it: ``done``,
    ``shared`` (from another run, as of :func:`link_shared`), ``out of date`` (it was made for
    another recipe, text or stage before it), ``removed`` (what it had made), ``failed``,
    ``stopped`` (it has saved), ``interrupted`` or ``not started``."""
    waiting = {stage.name for stage in left(run_dir, stages)}
    return {
        stage.name: _status(run_dir, stage, share, is_left=stage.name in waiting)
        for stage in stages
    }


def _status(run_dir: Path, stage: Stage, share: Sequence[str], *, is_left: bool) -> tuple[str, str]:
    directory = run_dir / stage.directory
    if done(run_dir, stage) is not None:
        lost = stage.kind in graph.TRAINED and newest_step(directory) is None
        return "done", "its checkpoints were removed" if lost else ""
    if not is_left:
        return "done", "its token files were removed, and nothing that is left reads them"
    if (shared := find_shared(run_dir, stage, share)) is not None:
        return "shared", f"from {seen_from_here(shared)}"
    made_for, step = (find_json(directory / "stage.json") or {}).get("key"), newest_step(directory)
    if made_for is not None and made_for != stage.key:
        if (_shelf(run_dir, stage.directory, stage.key) / "done.json").exists():
            return "out of date", "was made for this recipe before: will be taken back from old/"
        return "out of date", "its part of the recipe, its text or a stage before it has changed"
    if (directory / "done.json").exists():
        return "removed", "what it had made is no longer there: will be made again"
    if (error := find_json(directory / "error.json")) is not None:
        return "failed", (str(error.get("message")).splitlines() or [""])[0]
    goes_on = f"goes on from {step.name}" if step else ""
    if (directory / "stopped.json").exists():
        return "stopped", goes_on
    begun = (directory / "attempts.jsonl").exists()
    return ("interrupted", goes_on) if begun else ("not started", "")


def make(run_dir: Path) -> list[Path]:
    """Make the run's directory.

    Returns:
        The directories that were not there before, innermost first.

    Raises:
        UserError: something else is in its place or in its way.
    """
    made, path = [], run_dir
    while not path.exists():
        made.append(path)
        path = path.parent
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            str(path), "is not a directory", "give another `run_dir:` or `name:`"
        ) from None
    return made


def saved(run_dir: Path, stages: tuple[Stage, ...]) -> set[tuple[Path, int]]:
    """What a failure must not take with it, each with the time of its last change (ns): whole
    checkpoints that these stages were trained to, and the word of those that were stopped. What is
    linked, or taken from elsewhere, can be had again."""
    trained = [run_dir / stage.directory for stage in stages if stage.kind != "import"]
    found = set()
    for directory in trained:
        if not directory.is_symlink():
            paths = [*directory.glob("checkpoints/step_????????"), directory / "stopped.json"]
            found |= {(path, path.stat().st_mtime_ns) for path in paths if path.exists()}
    return found


def claim(run_dir: Path, stage: Stage) -> Path | None:
    """Make the stage's directory the one for ``stage.key``, ready for an attempt.

    What was made for another key is kept under ``old/`` and comes back when the recipe asks for it
    again. ``prepare`` stays where it is: it keeps by itself what has not changed.

    Returns:
        Where the former content went, if there was any.
    """
    directory = run_dir / stage.directory
    former = (find_json(directory / "stage.json") or {}).get("key")
    is_lost = former == stage.key and done(run_dir, stage) is None
    if directory.is_symlink() and (is_lost or former != stage.key):  # another run's: it stays so
        directory.unlink()
        former = None
    elif is_lost:  # a batch script takes this file for the end of the attempt that begins
        (directory / "done.json").unlink(missing_ok=True)
    moved = None
    if former not in (None, stage.key):
        if stage.kind == "prepare":
            (directory / "done.json").unlink(missing_ok=True)
        else:
            moved = _unused(_shelf(run_dir, stage.directory, str(former)))
            moved.parent.mkdir(exist_ok=True)
            os.rename(directory, moved)
    shelved = _shelf(run_dir, stage.directory, stage.key)
    # Here too where the process that shelved the former one ended before it came to this.
    if not os.path.lexists(directory) and shelved.is_dir():
        os.rename(shelved, directory)
    (directory / "log").mkdir(parents=True, exist_ok=True)
    if former != stage.key:
        write_json(directory / "stage.json", {"name": stage.name, "key": stage.key})
    return moved


def link_shared(run_dir: Path, stages: tuple[Stage, ...], share: Sequence[str]) -> dict[str, Path]:
    """Link the stages that are not done here but finished, for the same key, in another run.

    Two systems that share a stage so train it once. A stage that was begun here is left alone.

    Args:
        run_dir: this run's.
        stages: this run's.
        share: other runs' directories, ``*`` allowed.

    Returns:
        Name of each stage that was linked, and the directory that it is.
    """
    taken = {}
    for stage in missing(run_dir, stages):
        here = run_dir / stage.directory
        if (real := find_shared(run_dir, stage, share)) is not None:
            here.unlink(missing_ok=True)  # a link to what is of another key, or there no more
            here.symlink_to(os.path.relpath(real, run_dir.resolve()))
            taken[stage.name] = real
    return taken


def find_shared(run_dir: Path, stage: Stage, share: Sequence[str]) -> Path | None:
    """Directory of a stage that is finished for the same key in another run, and can be taken;
    arguments as of :func:`link_shared`."""
    if not may_take(run_dir, stage) or stage.kind in graph.LOOKS_AHEAD:
        return None
    found = sorted(Path(path).resolve() for pattern in share for path in glob.glob(pattern))
    for other in found:
        has = stage.kind not in graph.TRAINED or newest_step(other / stage.directory) is not None
        if other != run_dir.resolve() and has and done(other, stage) is not None:
            return (other / stage.directory).resolve()
    return None


def may_take(run_dir: Path, stage: Stage) -> bool:
    """Whether a stage may be another run's: one that was begun here is left alone, and every run
    has its own tables and pages."""
    here = run_dir / stage.directory
    begun = here.exists() and not here.is_symlink()
    return not begun and stage.kind not in ("evaluate", "export", "report")


def _shelf(run_dir: Path, directory: str, key: str) -> Path:
    return run_dir / "old" / f"{directory}-{key[:12]}"


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate


def next_attempt(directory: Path) -> int:
    """Number of the coming attempt of a stage, from 1."""
    names = [item.name for item in (directory / "log").glob("attempt-*.log")]
    numbers = [int(match[1]) for name in names if (match := re.match(r"attempt-(\d+)\.log", name))]
    return max(numbers, default=0) + 1


def begin(directory: Path, attempt: int, world_size: int, **more: Any) -> None:
    """Note an attempt's start and when the one before it ended, and forget how that ended. ``more``
    goes into its line: under Slurm the job, and how far the stage had come."""
    attempts = read_attempts(directory)
    if attempts:
        more["former_ended"] = _last_sign(directory, attempts[-1]["attempt"])
    for name in ("stopped.json", "error.json", "progress.json", LEAVE):
        (directory / name).unlink(missing_ok=True)
    line = {"attempt": attempt, "time": time.time(), "world_size": world_size, **more}
    append_line(directory / "attempts.jsonl", line)


def seconds(directory: Path) -> float:
    """Wall-clock seconds spent on a stage over all its attempts; one that was killed counts until
    the last sign of it."""
    attempts = read_attempts(directory)
    ends = [line.get("former_ended", 0.0) for line in attempts[1:]] + [time.time()]  # or none
    spent = (end - line["time"] for line, end in zip(attempts, ends, strict=False))
    return sum(max(0.0, seconds) for seconds in spent)


def _last_sign(directory: Path, attempt: int) -> float:
    """When an attempt, the latest, last wrote: its log is silent in training, metrics in saves."""
    names = ("metrics.jsonl", "progress.json", "stopped.json", "error.json")
    paths = [log_file(directory, attempt), *(directory / name for name in names)]
    return max(path.stat().st_mtime if path.exists() else 0.0 for path in paths)


def log_file(directory: Path, attempt: int) -> Path:
    """Where all ranks of an attempt write."""
    return directory / "log" / _log(attempt)


def finish(directory: Path, stage: Stage, outputs: dict[str, Any]) -> None:
    """Write ``done.json``: from here on the stage is not run again."""
    record = {
        "key": stage.key,
        "name": stage.name,
        "kind": stage.kind,
        "seconds": round(seconds(directory), 3),
        "attempts": len(read_attempts(directory)),
        "world_size": stage.world_size,
        "num_threads": stage.num_threads,
        "finished": time.time(),
        "versions": versions(),
        "code_revision": code_revision(),
        "outputs": outputs,
    }
    write_json(directory / "done.json", record)
    (directory / "progress.json").unlink(missing_ok=True)


def _log(attempt: int) -> str:
    return f"attempt-{attempt}.log"
