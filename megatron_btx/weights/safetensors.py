"""Safetensors files: one file, or those of a directory that are the model (find_checkpoint.py).

The format is a little-endian length, a JSON header of that length (name -> dtype, shape, byte
range) and the tensors' bytes; nothing in it can run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.errors import UserError, UserErrors, capped, shown
from megatron_btx.files import parse_json
from megatron_btx.weights.box import Box, Shape, sizes
from megatron_btx.weights.find_checkpoint import index_of, weight_files
from megatron_btx.weights.mmap_io import read_box
from megatron_btx.weights.plan import Ignore
from megatron_btx.weights.source import FileSource

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NUMBERS = ("I64", "BOOL")
"""Of no quantised weight: indices and masks."""
_MAX_HEADER = 16 << 20
"""Bytes: 100,000 tensors. The format allows 100 MB, which would take gigabytes as JSON."""


@dataclass(frozen=True)
class _Stored:
    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape
    strides: Shape

    @property
    def nbytes(self) -> int:
        """Of the data."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsSource(FileSource[_Stored]):
    """The tensors of a ``.safetensors`` file, or of a model's directory.

    Args:
        path: the file or the directory.
        ignored: tensors that are no weights. Of a dtype that no weight has, they are left out.

    Raises:
        UserErrors: a shard missing, truncated or corrupt, a tensor of an index that no file holds
            (or twice); all of them at once.
    """

    def __init__(self, path: Path | str, ignored: Sequence[Ignore] = ()) -> None:
        super().__init__(path)
        errors: list[UserError] = []
        for file in weight_files(self.path):
            self._open(file)
            try:
                found = _header(file, ignored)
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
        kinds = DTYPES.values()
        self._stored = {name: one for name, one in self._stored.items() if one.dtype in kinds}

    def read(self, name: str, box: Box) -> Tensor:
        """A view of the file's pages."""
        stored = self._counted(name, box)
        return read_box(stored.path, stored.offset, stored.dtype, stored.strides, box)


_LFS = b"version https://git-lfs.github.com/"


def _header(path: Path, ignored: Sequence[Ignore]) -> dict[str, _Stored]:
    """Parse and check one file's header against the file's size."""
    fix = "copy or download the file again"
    if not path.is_file():
        what = "is a pipe, a device or a directory" if path.exists() else "missing"
        raise UserError(str(path), what, fix)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if file.seek(0) == 0 and file.read(len(_LFS)) == _LFS:
            what = "is a pointer of Git LFS: the file itself was not downloaded"
            raise UserError(str(path), what, "run `git lfs pull` there, or `hf download`")
        file.seek(8)
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(str(path), "truncated, or not a safetensors file", fix)
        raw = file.read(length)
    header = parse_json(raw, f"{path}: its header")
    header.pop("__metadata__", None)
    try:
        found = {name: _stored(path, name, entry, ignored) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(str(path), f"corrupt header: {error}", fix) from error
    end = _end(path, found)
    if 8 + length + end > size:
        what = f"truncated: {size} bytes of {8 + length + end}"
        raise UserError(str(path), what, fix)
    if 8 + length + end < size:  # as safetensors itself
        what = f"damaged: it is {8 + length + end} bytes by its header, and has {size}"
        raise UserError(str(path), what, fix)
    return {name: replace(one, offset=8 + length + one.offset) for name, one in found.items()}


def _stored(path: Path, name: str, entry: Any, ignored: Sequence[Ignore]) -> _Stored:
    """What the header says of one tensor, its offset counted from the end of the header."""
    start, stop = sizes(entry["data_offsets"])
    shape = sizes(entry["shape"])
    kind = entry["dtype"]
    if not isinstance(kind, str) or kind not in DTYPES:
        if any(re.fullmatch(one.pattern, name) for one in ignored):
            return _Stored(path, start, torch.uint8, (stop - start,), (1,))
        what = f"tensor {shown(name)} has dtype {shown(kind)}, not one of {', '.join(DTYPES)}"
        fix = "give the model before it was quantised: weights are fp32, bf16 or fp16"
        if kind in _NUMBERS:
            fix = "if it is no weight, write the files again without it, else give the weights as"
            fix += " fp32, bf16 or fp16"
        raise UserError(str(path), what, fix)
    dtype = DTYPES[kind]
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"tensor {shown(name)}: {stop - start} bytes for shape {shown(shape)}")
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return _Stored(path, start, dtype, shape, strides)


def _end(path: Path, found: Mapping[str, _Stored]) -> int:
    """Bytes of all tensors, which lie one behind the other without holes: the format's own rule
    (``safetensors`` refuses anything else), so that no two names mean the same bytes.

    Raises:
        UserError: they do not.
    """
    end = 0
    for name, one in sorted(found.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if one.offset != end:
            what = f"corrupt header: tensor {shown(name)} begins at byte {one.offset}, not {end}"
            raise UserError(str(path), what, "copy or download the file again")
        end += one.nbytes
    return end


def _missing(path: Path, stored: Mapping[str, _Stored]) -> list[UserError]:
    names = index_of(path) if path.is_dir() else None
    absent = sorted(set(names or ()) - set(stored))
    fix = "copy the files again"
    return capped(
        [UserError(str(path), f"tensor {n} of the index is in no file", fix) for n in absent]
    )
