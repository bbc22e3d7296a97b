"""Where tensors come from: anything that answers "give me this box of that tensor"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_btx.weights.box import Box, Shape, slices, whole
from megatron_btx.weights.expression import Expression, Take


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

    def read(self, name: str, box: Box) -> Tensor:
        """The box of the expression, evaluated over what lies below."""
        return self.expressions[name].evaluate(box, lambda _, below, box: self.of.read(below, box))


def take_all(label: str, source: Source) -> dict[str, Expression]:
    """Every tensor of a source as an expression, by name."""
    return {name: Take(label, name, *meta) for name, meta in source.tensors.items()}


def read_whole(source: Source, name: str) -> Tensor:
    """One tensor, all of it."""
    return source.read(name, whole(source.tensors[name][0]))
