"""The real worker with stages that only pass the time, as ``behaviour`` in the environment says.

``BTX_FAKE`` is JSON: stage name -> {"seconds", "hold", "fail", "deaf", "child", "after", "save"}:
see ``_stage``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, worker
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.state import find_json, write_json
from megatron_btx.recipe.schema import Recipe

STEPS = 20


def _stage(recipe: Recipe, stage: Stage, run_dir: Path) -> dict[str, object]:
    """Twenty steps that resume where a stop left them; a step is a line of ``metrics.jsonl``."""
    wish = json.loads(os.environ.get("BTX_FAKE", "{}")).get(stage.name, {})
    directory, rank = run_dir / stage.directory, int(os.environ["RANK"])
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    if wish.get("child"):  # a child that would survive: own session, default signals
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    while "after" in wish and not (run_dir / wish["after"] / "metrics.jsonl").exists():
        time.sleep(0.05)  # that one listens to signals by now
    if wish.get("fail") == "user" and rank == 0:
        raise UserError("corpus.jsonl: line 3", "is not an object with `text`", "mend it")
    if wish.get("fail") == "crash" and rank == stage.world_size - 1:
        raise RuntimeError("a crash, as asked")
    if wish.get("fail") == "exit":
        os._exit(3)
    first = 0
    with contextlib.suppress(TypeError):
        first = find_json(directory / "saved.json")["step"]
    pause = wish.get("seconds", 0.2) / STEPS
    with (directory / "metrics.jsonl").open("a") as metrics:
        attempt = int(os.environ["BTX_ATTEMPT"])
        start = {"kind": "start", "step": first, "total_steps": STEPS, "attempt": attempt}
        _write(metrics, rank, {**start, "time": time.time()})
        for step in range(first + 1, STEPS + 1):
            time.sleep(pause)
            record = {"kind": "train", "step": step, "tokens": 64 * step, "loss": 4.0 / step}
            _write(metrics, rank, {**record, "time": time.time()})
            if rank == 0:
                write_json(directory / "saved.json", {"step": step})
                if wish.get("save") and step % wish["save"] == 0:
                    (directory / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
            if wish.get("fail") == "full" and step == STEPS // 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            while step == wish.get("hold") and not (stop and not wish.get("deaf")):
                time.sleep(0.05)  # until it is asked to stop, or may go on
                if (run_dir / "go").exists():
                    break
            if stop and not wish.get("deaf"):
                if rank == 0:
                    write_json(directory / "stopped.json", {"step": step})
                else:
                    time.sleep(0.3)
                return {}
    if stage.kind in graph.TRAINED:  # what the stages behind it start from
        (directory / "checkpoints" / f"step_{STEPS:08d}").mkdir(parents=True, exist_ok=True)
    return {"steps": STEPS, "pid": os.getpid()}


def _write(file: object, rank: int, record: dict[str, object]) -> None:
    if rank == 0:
        file.write(json.dumps(record) + "\n")  # type: ignore[attr-defined]
        file.flush()  # type: ignore[attr-defined]


if __name__ == "__main__":
    worker.KINDS.update(dict.fromkeys(worker.KINDS, _stage))
    code = worker.main()
    sys.stdout.flush()
    os._exit(code)
