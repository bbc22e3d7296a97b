"""Where tensors come from: anything that answers "give me this box of that tensor"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.box import Box, Shape, extent, slices, whole
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.mmap_io import stamp_of, state_of

_BLOCK = 1 << 20
"""Elements of which a sum is taken at a time. Part of the definition of every moment."""


class Source(Protocol):
    """Named tensors at rest."""

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Every tensor by name: what there is is known without reading any of it."""

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of ``box``; callers never write to the result."""

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data handed out so far."""

    @property
    def stamp(self) -> str:
        """Changes when what is stored changes; what an interrupted run is recognised by."""

    def files(self) -> list[Path]:
        """What it reads; none where it reads no files, or only through another source."""

    def changed(self) -> list[UserError]:
        """What of it was written to since it was opened, so that what was read may be a mixture."""


class InFile(Protocol):
    """What a source knows of a tensor in files."""

    @property
    def shape(self) -> Shape:
        """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""


Stored = TypeVar("Stored", bound=InFile)


class FileSource(Generic[Stored]):
    """What sources of files share: what is stored, whether it stays as it is, and a count of the
    bytes handed out.

    Args:
        path: the directory, or the one file.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._stored: dict[str, Stored] = {}
        self._bytes_read = 0
        self._states: dict[Path, object] = {}

    def _open(self, file: Path) -> None:
        """Remember the state of a file that is about to be read."""
        self._states.setdefault(file, state_of(file))

    @property
    def stamp(self) -> str:
        """Names, sizes and times of the files."""
        return stamp_of(self._states)

    def files(self) -> list[Path]:
        """The files, of one directory."""
        return list(self._states)

    def changed(self) -> list[UserError]:
        """The files that are not as they were when they were opened."""
        return [
            UserError(str(path), "was changed while it was read", "leave it alone, and start again")
            for path, state in self._states.items()
            if state_of(path) != state
        ]

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Global shapes and dtypes by stored name."""
        return {name: (stored.shape, stored.dtype) for name, stored in self._stored.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data handed out so far."""
        return self._bytes_read

    def _counted(self, name: str, box: Box) -> Stored:
        """What is stored as ``name``, of which ``box`` is about to be read."""
        stored = self._stored[name]
        self._bytes_read += prod(extent(box)) * stored.dtype.itemsize
        return stored


@dataclass(frozen=True)
class Unread:
    """Tensors that are not there yet: enough to plan with, and to count what would be read."""

    tensors: Mapping[str, tuple[Shape, torch.dtype]]

    @property
    def bytes_read(self) -> int:
        """No files."""
        return 0

    @property
    def stamp(self) -> str:
        """Empty: it has no files."""
        return ""

    def files(self) -> list[Path]:
        """No files."""
        return []

    def changed(self) -> list[UserError]:
        """Nothing."""
        return []

    def read(self, name: str, box: Box) -> Tensor:
        """Never."""
        raise AssertionError(f"{name} {box} is read, and is not there")


class MemorySource:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self._bytes_read = 0

    @property
    def tensors(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shapes and dtypes by name."""
        return {name: (tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data handed out so far."""
        return self._bytes_read

    @property
    def stamp(self) -> str:
        """Of this object: memory does not outlive a run."""
        return f"memory {id(self)}"

    def files(self) -> list[Path]:
        """No files."""
        return []

    def changed(self) -> list[UserError]:
        """Nothing: nothing else writes to it."""
        return []

    def read(self, name: str, box: Box) -> Tensor:
        """A view of the tensor."""
        found = self._tensors[name].detach()[slices(box)]
        self._bytes_read += found.nbytes
        return found


@dataclass(frozen=True)
class View:
    """A source whose tensors are expressions over another source.

    How a format stores a tensor (stacked over layers, padded, split in two) and how a family names
    it are both of this kind, so everything above sees canonical names and nothing else.
    """

    of: Source
    expressions: Mapping[str, Expression]
    """Over takes of ``of``, whose source name is not looked at."""
    tensors: Mapping[str, tuple[Shape, torch.dtype]] = field(init=False)

    def __post_init__(self) -> None:
        shapes = {name: (e.shape, e.dtype) for name, e in self.expressions.items()}
        object.__setattr__(self, "tensors", shapes)

    @property
    def bytes_read(self) -> int:
        """Bytes read from what lies below."""
        return self.of.bytes_read

    @property
    def stamp(self) -> str:
        """That of what lies below."""
        return self.of.stamp

    def files(self) -> list[Path]:
        """Those of what lies below."""
        return self.of.files()

    def changed(self) -> list[UserError]:
        """That of what lies below."""
        return self.of.changed()

    def read(self, name: str, box: Box) -> Tensor:
        """The box of the expression, evaluated over what lies below."""
        return self.expressions[name].evaluate(box, lambda _, below, box: self.of.read(below, box))


def nbytes(source: Source, name: str, box: Box) -> int:
    """Bytes that reading a box of a tensor reads of what is stored."""
    if isinstance(source, View):
        below = source.expressions[name].reads(box)
        return sum(nbytes(source.of, stored, part) for _, stored, part in below)
    return prod(extent(box)) * source.tensors[name][1].itemsize


def take_all(label: str, source: Source) -> dict[str, Expression]:
    """Every tensor of a source as an expression, by name."""
    return {name: Take(label, name, *meta) for name, meta in source.tensors.items()}


def read_whole(source: Source, name: str) -> Tensor:
    """One tensor, all of it."""
    return source.read(name, whole(source.tensors[name][0]))
