"""Safetensors files: one file, or those of a directory that are the model (model_files.py).

The format is a little-endian length, a JSON header of that length (name -> dtype, shape, byte
range) and the tensors' bytes; nothing in it can run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_btx.errors import UserError, UserErrors, capped
from megatron_btx.weights.box import Box, Shape
from megatron_btx.weights.mmap_io import read_box
from megatron_btx.weights.model_files import index_of, weight_files
from megatron_btx.weights.source import FileSource

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAX_HEADER = 100 << 20
"""The format's own limit."""


@dataclass(frozen=True)
class _Stored:
    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape
    strides: Shape


class SafetensorsSource(FileSource[_Stored]):
    """The tensors of a ``.safetensors`` file, or of a model's directory.

    Raises:
        UserErrors: a shard missing, truncated or corrupt, a tensor of an index that no file holds
            (or twice); all of them at once.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        errors: list[UserError] = []
        for file in weight_files(self.path):
            self._open(file)
            try:
                found = _header(file)
            except UserError as error:
                errors.append(error)
                continue
            for name in sorted(found.keys() & self._stored.keys()):
                errors.append(UserError(str(file), f"tensor {name} is in two files"))
            self._stored.update(found)
        if not errors:
            errors = _missing(self.path, self._stored)
        if errors:
            raise UserErrors(capped(errors))

    def read(self, name: str, box: Box) -> Tensor:
        """A view of the file's pages."""
        stored = self._counted(name, box)
        return read_box(stored.path, stored.offset, stored.dtype, stored.strides, box)


def _header(path: Path) -> dict[str, _Stored]:
    """Parse and check one file's header against the file's size."""
    fix = "copy or download the file again"
    if not path.is_file():
        raise UserError(str(path), "missing", fix)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(str(path), "truncated, or not a safetensors file", fix)
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found, end = {}, 0
        for name, entry in header.items():
            shape = tuple(int(size) for size in entry["shape"])
            start, stop = entry["data_offsets"]
            if entry["dtype"] not in DTYPES:
                what = f"tensor {name} has dtype {entry['dtype']}, not one of {', '.join(DTYPES)}"
                fix = "give the model before it was quantised: weights are fp32, bf16 or fp16"
                raise UserError(str(path), what, fix)
            dtype = DTYPES[entry["dtype"]]
            if not 0 <= start <= stop or stop - start != prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name}: {stop - start} bytes for shape {shape}")
            strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
            found[name] = _Stored(path, 8 + length + start, dtype, shape, strides)
            end = max(end, stop)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), f"corrupt header: {error}", fix) from error
    if 8 + length + end > size:
        what = f"truncated: {size} bytes of {8 + length + end}"
        raise UserError(str(path), what, fix)
    return found


def _missing(path: Path, stored: Mapping[str, _Stored]) -> list[UserError]:
    names = index_of(path) if path.is_dir() else None
    absent = sorted(set(names or ()) - set(stored))
    fix = "copy the files again"
    return capped(
        [UserError(str(path), f"tensor {n} of the index is in no file", fix) for n in absent]
    )
