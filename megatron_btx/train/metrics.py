"""``metrics.jsonl``: every step once, in order, also after a crash."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_btx.files import read_lines, written


class MetricsLog:
    """One JSON object a line: ``{"kind": "train" | "eval" | "start", "step": ..., ...}``.

    A run that goes on from step k first drops what a killed one had logged beyond k, and a last
    line that was cut off; what it then logs again are the same values.

    Args:
        path: the file; its directory exists.
        resumed_step: the step the run goes on from, 0 for a new one.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [
            record
            for record in read(path)
            # A run that starts over evaluates step 0 again too.
            if record["kind"] == "start" or (resumed_step and record["step"] <= resumed_step)
        ]
        with written(path) as file:
            file.writelines(_line(record) for record in kept)
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **values: Any) -> dict[str, Any]:
        """Append a record; it is in the file when this returns."""
        record = {"kind": kind, "step": step, **values, "time": round(time.time(), 3)}
        self._file.write(_line(record))
        self._file.flush()
        return record

    def sync(self) -> None:
        """Make what is written durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make the file durable and close it."""
        self.sync()
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The whole records of a log; none where there is no file."""
    return [
        record
        for record in read_lines(path)
        if isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    ]


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
