"""The ranks that evaluate, generate or analyse for the command line, outside any run.

``start`` starts them here and waits; under ``srun`` or ``torchrun`` the command itself is one of
them. A request and its answer are JSON. Imports no torch until a rank works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_btx import engine
from megatron_btx.errors import RanksCrashed, UserError, UserErrors
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.files import find_json, remove_tree, undisturbed, unfinished, write_json
from megatron_btx.pipeline import failure
from megatron_btx.pipeline.local import reaper, run_stages
from megatron_btx.recipe.schema import Layout

EvalRequest = Mapping[str, Any]
"""``{"what": "data", "tasks", "generate", "routing", "token_routing", "centroids" or "export",
"layout": {...}, "subjects": [...], ...}`` and what that one takes; ``"writes"``: files that a rank
writes."""

_PLACES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
)
"""Of a rank that a launcher has started. Slurm's second name is set by ``srun`` alone: the batch
script, which is no rank, has its job's number of tasks under another."""


def request_of(
    what: str, subjects: list[Subject], layout: Layout, **entries: Any
) -> dict[str, Any]:
    """A request as JSON."""
    written = [dataclasses.asdict(subject) for subject in subjects]
    for entry in written:
        entry["models"] = {name: str(path) for name, path in entry["models"].items()}
        entry["run_dir"] = None if entry["run_dir"] is None else str(entry["run_dir"])
    return {"what": what, "layout": dataclasses.asdict(layout), "subjects": written, **entries}


def answer(request: EvalRequest) -> Any:
    """What the ranks answer; ``None`` on a launcher's rank that is not the first.

    Raises:
        UserError: as the ranks found it.
        RanksCrashed: a rank ended without an answer.
    """
    world_size = Layout(**request["layout"]).world_size
    for rank, size, local_rank in _PLACES:
        if rank in os.environ and _number(size) > 1:
            os.environ["RANK"], os.environ["WORLD_SIZE"] = os.environ[rank], os.environ[size]
            os.environ["LOCAL_RANK"] = os.environ.get(local_rank, "0")
            reaper.end_at_once()
            return _work(request)
    return _start(request, world_size)


def _number(name: str) -> int:
    """A variable that is a whole number, 1 where there is none."""
    text = os.environ.get(name, "1")
    if not text.strip().isdecimal():
        raise UserError(name, f"is {text!r}", "give a whole number, or unset it")
    return int(text)


def _start(request: EvalRequest, world_size: int) -> Any:
    most = run_stages.most_ranks()
    if world_size > most:
        raise UserError(
            "--layout",
            f"asks for {world_size} ranks, and this machine has {run_stages.cores()} core(s)",
            f"give a layout of {most} ranks or fewer, or start the command's ranks by srun",
        )
    with _scratch() as scratch:
        write_json(scratch / "request.json", dict(request))
        threads = str(request["layout"].get("num_threads", 1))
        environment = {
            **os.environ,
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "BTX_INIT_METHOD": f"file://{scratch / 'ranks'}",
            "BTX_PARENT": str(os.getpid()),
            "OMP_NUM_THREADS": threads,
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
            "TMPDIR": str(scratch),
        }
        command = [sys.executable, "-m", "megatron_btx.pipeline.eval_ranks", str(scratch)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(world_size):
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with undisturbed():  # a rank that runs is in the list
                    ranks.append(_rank(command, own))
            _wait(ranks)
        finally:
            for process in ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for path in map(Path, request.get("writes", ())):
                    unfinished(path, process.pid).unlink(missing_ok=True)
        found = find_json(scratch / "error.json")
        if found is not None:
            raise _mistake(found["errors"])
        found = find_json(scratch / "answer.json")
        if found is None:
            raise RanksCrashed
        return found["answer"]


def _rank(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A directory for as long as the block lasts."""
    path = Path(tempfile.mkdtemp(prefix="btx-"))
    try:
        yield path
    finally:
        remove_tree(path)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or one has failed: the others would never stop waiting for it."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            time.sleep(1.0)  # to the end of its message
            return
        time.sleep(0.05)


def _mistake(errors: list[list[str]]) -> UserError:
    found = [UserError(*one) for one in errors]
    return found[0] if len(found) == 1 else UserErrors(found)


def main(arguments: list[str] | None = None) -> int:
    """What a rank runs; its exit code: 0, 2 for a user's mistake, 1 for a crash."""
    reaper.die_with_parent()
    (name,) = sys.argv[1:] if arguments is None else arguments
    scratch = Path(name)
    request = find_json(scratch / "request.json")
    assert request is not None
    try:
        found = _work(request)
        if os.environ["RANK"] == "0":
            write_json(scratch / "answer.json", {"answer": found})
        return 0
    except Exception as raised:
        error = failure.of_system(raised) if isinstance(raised, OSError) else raised
        if not isinstance(error, UserError):
            traceback.print_exc()
            return 1
        errors = error.errors if isinstance(error, UserErrors) else [error]
        triples = [[one.where, one.what, one.fix] for one in errors]
        if not (scratch / "error.json").exists():
            write_json(scratch / "error.json", {"errors": triples})
        return 2


def _work(request: EvalRequest) -> Any:
    """Do what is asked, on every rank; the answer on the first."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")  # of libraries, to people who cannot do anything about them
    logging.getLogger().setLevel(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"  # progress is told by us, once
    with engine.importing():
        from megatron_btx.engine import distributed

    layout = Layout(**request["layout"])
    distributed.initialize(layout, request.get("random_seed", 0))
    try:
        found = _KINDS[request["what"]](request, layout)
    finally:
        if sys.exc_info()[0] is None:  # else other ranks may be waiting in a collective
            distributed.shutdown()
    return found if os.environ.get("RANK", "0") == "0" else None


def _subjects(request: EvalRequest) -> list[Subject]:
    found = []
    for entry in request["subjects"]:
        models = {name: Path(path) for name, path in entry["models"].items()}
        text = {name: tuple(files) for name, files in entry["text"].items()}
        run_dir = None if entry["run_dir"] is None else Path(entry["run_dir"])
        typed = {"models": models, "text": text, "run_dir": run_dir}
        found.append(Subject(**{**entry, **typed, "experts": tuple(entry["experts"])}))
    return found


def _data(request: EvalRequest, layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.loss_on_text import EvalSetting, evaluate_data

    setting = EvalSetting(layout=layout, **request["setting"])
    return {
        subject.name: evaluate_data(subject, request["data"], setting, ProgressLine(subject.name))
        for subject in _subjects(request)
    }


def _tasks(request: EvalRequest, layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.tasks import evaluate_tasks

    return {
        subject.name: evaluate_tasks(
            _predictor(request, layout, subject), request["tasks"], ProgressLine(subject.name)
        )
        for subject in _subjects(request)
    }


def _generate(request: EvalRequest, layout: Layout) -> list[dict[str, Any]]:
    from megatron_btx.evaluate.generate import Decoding, generate

    (subject,) = _subjects(request)
    predictor = _predictor(request, layout, subject)
    asked, context = dict(request["decoding"]), predictor.seq_length
    if asked["max_new_tokens"] is None:
        asked["max_new_tokens"] = max(1, min(64, context // 2))
    elif asked["max_new_tokens"] >= context:
        what = f"is {asked['max_new_tokens']}, and the model's context has {context} tokens"
        raise UserError("--max-new-tokens", what, "give fewer: the prompt needs room too")
    decoding = Decoding(**{**asked, "until": tuple(asked["until"])})
    found = generate(predictor, request["prompts"], decoding, ProgressLine("generating"))
    return [dataclasses.asdict(one) for one in found]


def _routing(request: EvalRequest, layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.loss_on_text import EvalSetting
    from megatron_btx.evaluate.measure_routing import measure

    setting = EvalSetting(layout=layout, **request["setting"])
    return {
        subject.name: measure(subject, request["data"], setting, ProgressLine(subject.name))
        for subject in _subjects(request)
    }


def _token_routing(request: EvalRequest, layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.token_routing import route

    (subject,) = _subjects(request)
    predictor = _predictor(request, layout, subject)
    return route(predictor, request["texts"], ProgressLine(subject.name))


def _centroids(request: EvalRequest, layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.centroids import measure
    from megatron_btx.evaluate.loss_on_text import EvalSetting

    (subject,) = _subjects(request)
    return measure(
        subject,
        request["data"],
        EvalSetting(layout=layout, **request["setting"]),
        **request["how"],
        out=Path(request["out"]),
        statistics=Path(request["statistics"]) if request["statistics"] else None,
        progress=ProgressLine(subject.name),
    )


def _export(request: EvalRequest, _layout: Layout) -> dict[str, Any]:
    from megatron_btx.evaluate.export import export_model

    run_dir, out = Path(request["run_dir"]), Path(request["out"])
    return export_model(run_dir, request["stage"], out, check=request["check"])


def _predictor(request: EvalRequest, layout: Layout, subject: Subject) -> Any:
    from megatron_btx.evaluate.predictor import Predictor

    return Predictor(subject, layout, **request["predictor"])


_KINDS = {
    "data": _data,
    "tasks": _tasks,
    "generate": _generate,
    "routing": _routing,
    "token_routing": _token_routing,
    "centroids": _centroids,
    "export": _export,
}


class ProgressLine:
    """How far the first rank is, on stderr: one line that changes on a terminal, else a line every
    ten seconds."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._live = sys.stderr.isatty()
        self._speaks = os.environ.get("RANK", "0") == "0"
        self._began = time.monotonic()
        self._next = self._began + (0.2 if self._live else 10.0)

    def __call__(self, share: float) -> None:
        """``share`` is done, from 0 to 1."""
        now = time.monotonic()
        if not self._speaks or (now < self._next and not (self._live and share >= 1)):
            return
        self._next = now + (0.2 if self._live else 10.0)
        left = (now - self._began) * (1 - share) / share if share > 0 else 0.0
        text = f"{self.what}: {share:.0%}, {left:.0f} s left"
        if not self._live:
            text += "\n"
        else:
            text = "\r\x1b[K" + (text if share < 1 else "")
        sys.stderr.write(text)
        sys.stderr.flush()


def threads(world_size: int) -> int:
    """CPU threads a rank, by default: the cores divided by the ranks."""
    return max(1, run_stages.cores() // world_size)


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if exit_code:
        os._exit(exit_code)  # other ranks may be waiting in a collective
    sys.exit(0)
