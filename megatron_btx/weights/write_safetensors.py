"""The sink for Hugging Face directories: safetensors files with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.weights.directory import LargeFile, as_json, write_directory
from megatron_btx.weights.execute import ONE_BY_ONE, Execution
from megatron_btx.weights.ops import nbytes
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.safetensors import DTYPES

SHARD = 2 << 30
"""Bytes a file, about: what an interrupted run loses at most."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    plan: Plan,
    out: Path,
    *,
    files: Callable[[], Mapping[str, bytes]] = dict,
    shard: int = SHARD,
    execution: Execution = ONE_BY_ONE,
    check: Callable[[Path], object] = lambda _directory: None,
) -> None:
    """Write a plan's targets as ``model*.safetensors`` into a new directory.

    Args:
        plan: over the names that the files shall have.
        out: the directory; appears when it is whole.
        files: what else goes into it, asked for at the end (config.json, ...).
        shard: bytes a file.
        execution: how; no bit of the result depends on it.
        check: called with the directory before it gets its name.

    Raises:
        UserError: see :func:`write_directory`.
    """
    groups = _groups(plan, shard)
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    large_files = [
        LargeFile(
            name,
            sum(nbytes(plan.targets[t]) for t in group),
            partial(_write, plan, group, execution),
        )
        for name, group in zip(names, groups, strict=True)
    ]
    index: dict[str, Any] = {
        "metadata": {"total_size": plan.nbytes},
        "weight_map": {t: name for name, group in zip(names, groups, strict=True) for t in group},
    }

    def small() -> dict[str, bytes]:
        plan.check_unchanged()
        shown = {"model.safetensors.index.json": as_json(index)} if len(groups) > 1 else {}
        return {**shown, **files()}

    write_directory(
        out,
        identity=f"safetensors {shard} {plan.identity}",
        large_files=large_files,
        workers=execution.workers,
        files=small,
        check=check,
    )


def _groups(plan: Plan, shard: int) -> list[list[str]]:
    """Targets file by file, in the plan's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, target in plan.targets.items():
        if groups[-1] and size + nbytes(target) > shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes(target)
    return groups


def _write(plan: Plan, names: list[str], execution: Execution, file: BinaryIO) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        target = plan.targets[name]
        end = offset + nbytes(target)
        header[name] = {
            "dtype": _NAMES[target.dtype],
            "shape": list(target.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    errors: list[UserError] = []
    for name in names:
        for data in execution.stream(plan, plan.targets[name], errors):
            file.write(data)
    if errors:
        raise UserErrors(errors)
