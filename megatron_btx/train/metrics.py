"""``metrics.jsonl``: every step once, in order, also after a crash."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_btx.errors import UserError
from megatron_btx.files import written

logger = logging.getLogger(__name__)


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
            for record in read(path, strict=False)
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


_LINE = 64 << 20
"""Bytes of a line, at most."""


def read(path: Path, *, strict: bool = True) -> list[dict[str, Any]]:
    """The records of a log; none where there is no file. Lines that were cut off, by a full disk or
    a kill, are left out.

    Args:
        path: the file.
        strict: refuse a file with a record whose values are of another kind; else warn and leave
            that record out.

    Raises:
        UserError: it cannot be read, or (``strict``) a record is damaged.
    """
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(str(path), "is not a regular file", "move it away")
    records = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
            try:
                if (record := record_of(line)) is not None:
                    records.append(record)
            except ValueError as error:
                where = f"{path}:{number}"
                if strict:
                    raise UserError(where, f"is damaged: {error}", "remove that line") from None
                logger.warning("%s: %s; left out", where, error)
    return records


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record of a line; ``None`` of a line that was cut off.

    Raises:
        ValueError: its values are of another kind.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    if not isinstance(record.get("kind"), str):
        raise ValueError(f"kind is {record.get('kind')!r:.60}")
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r:.60}")
    for name, value in record.items():
        if "/" in name:
            _check_numbers(value, name, 0)
    _check_numbers(record.get("slow_ranks", {}), "slow_ranks", 1)
    if record["kind"] == "eval":
        _check_numbers(record.get("loss"), "loss", 1)
        for name in ("load", "gate"):
            _check_numbers(record.get(name, {}), name, 3)
        return record
    ranks = record.get("world_size", 1)
    if record["kind"] == "start" and (type(ranks) is not int or ranks < 1):
        raise ValueError(f"world_size is {ranks!r:.60}")
    for name in _NUMBERS:
        if name in record:
            _check_numbers(record[name], name, 0)
        if name in _WHOLE and name in record and not float(record[name]).is_integer():
            raise ValueError(f"{name} is {record[name]}, no whole number")
    return record


_NUMBERS = ("tokens", "loss", "tokens_per_second", "time", "total_steps")
_WHOLE = ("tokens", "total_steps")
_BY_NAME = ("loss", "slow_ranks")


def _check_numbers(value: Any, name: str, depth: int) -> None:
    """That ``value`` is a number, or a mapping of numbers, or of matrices of them."""
    if depth == 0:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r:.60}, no number")
        return
    kind = dict if depth == 3 or name in _BY_NAME else list
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {value!r:.60}")
    for part in value.values() if isinstance(value, dict) else value:
        _check_numbers(part, name, depth - 1)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
