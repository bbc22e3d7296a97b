"""Router rows in closed form, from sums over what each expert's domain gives to the MoE layers.

``centroids`` needs each domain's mean input; ``ridge`` needs X^T X over all domains as well. Sums
are in fp64 and kept in a file, so that a domain can be added later without reading the others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.files import check_file, try_lock, written

REGULARIZATION = 1e-3
"""lambda of ridge, as a share of the mean diagonal of X^T X."""


@dataclass
class Sums:
    """Sums over the tokens that each domain's text gives to its own expert, in fp64."""

    domains: tuple[str, ...]
    count: Tensor
    """[layers, domains]: tokens."""
    first: Tensor
    """[layers, domains, H]: X^T Y, the sum of each domain's inputs."""
    gram: Tensor | None
    """[layers, H, H]: X^T X over all domains; ``None`` where it is not needed."""

    def add(self, layer: int, domain: int, inputs: Tensor) -> None:
        """Count inputs [tokens, H] of one layer."""
        wide = inputs.double()
        self.count[layer, domain] += len(wide)
        self.first[layer, domain] += wide.sum(0)
        if self.gram is not None:
            self.gram[layer] += wide.T @ wide

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [self.count, self.first, *([] if self.gram is None else [self.gram])]


def no_sums(
    domains: Sequence[str], layers: int, hidden: int, *, gram: bool, device: torch.device | int
) -> Sums:
    """Sums over no token."""

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(layers, *shape, dtype=torch.float64, device=device)

    square = zeros(hidden, hidden) if gram else None
    return Sums(tuple(domains), zeros(len(domains)), zeros(len(domains), hidden), square)


def joined(sums: Sums, before: Sums | None, domains: Sequence[str]) -> Sums:
    """Those of two disjoint sets of domains, in the order of ``domains``."""
    if before is None:
        return sums
    count = torch.cat([sums.count, before.count.to(sums.count)], 1)
    first = torch.cat([sums.first, before.first.to(sums.first)], 1)
    have = (*sums.domains, *before.domains)
    order = [have.index(name) for name in domains]
    assert sums.gram is not None
    assert before.gram is not None
    gram = sums.gram + before.gram.to(sums.gram)
    return Sums(tuple(domains), count[:, order], first[:, order], gram)


def centroid_rows(sums: Sums) -> Tensor:
    """The domains' mean inputs, centred over the experts: rows [layers, experts, H], fp64."""
    means = sums.first / sums.count[..., None]
    return means - means.mean(1, keepdim=True)


def ridge_rows(sums: Sums, regularization: float = REGULARIZATION) -> Tensor:
    """Rows [layers, experts, H] in fp64 of the ridge regression of a token's domain on its input
    (DUME, arXiv 2603.29765): W = (X^T X + lambda I)^-1 X^T Y with Y one-hot, and no bias, which no
    exported router has. ``regularization``: lambda as a share of the mean diagonal of X^T X."""
    assert sums.gram is not None
    gram = sums.gram.clone()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += regularization * diagonal.mean(1, keepdim=True)
    return torch.cholesky_solve(sums.first.mT, torch.linalg.cholesky(gram)).mT


def version_of(path: Path | None) -> tuple[int, ...] | None:
    """Which of the files is there that have had this name; ``None``: none."""
    if path is None or not path.exists():
        return None
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def write_results(
    out: Path, rows: bytes, statistics: Path | None, sums: Sums, version: tuple[int, ...] | None
) -> None:
    """Write both files, or neither: sums that hold a domain say that its rows were written. Both
    are on the disk before either gets its name. Of processes that write one file at the same time,
    the first wins: a new name is taken by one of them, and sums that are there are locked.

    Args:
        out: of the rows.
        rows: its content.
        statistics: of the sums (safetensors, fp64), where they are kept.
        sums: with those that the file held.
        version: of that file when it was read (:func:`version_of`).

    Raises:
        UserError: somebody else has written the rows or the sums meanwhile: they would be lost.
    """
    try:
        with contextlib.ExitStack() as files:
            if statistics is not None:
                files.enter_context(_unchanged(statistics, version))
                _write_sums(files.enter_context(_new(statistics, version)), sums)
            files.enter_context(_new(out, None)).write(rows)  # takes its name first
    except FileExistsError as error:
        if error.filename == str(out):
            what = "has appeared while the text was read: another process has written it"
            raise UserError(str(out), what, "run this again with another name") from None
        out.unlink()  # ours, of a moment ago
        assert statistics is not None
        raise _changed(statistics) from None


def _new(path: Path, version: tuple[int, ...] | None) -> AbstractContextManager[IO[Any]]:
    """A file to write: in the place of the one that was read, or where none was."""
    return written(path, "wb", replace=version is not None)


def _write_sums(file: IO[Any], sums: Sums) -> None:
    tensors = {"count": sums.count, "first": sums.first, "gram": sums.gram}
    kept = {name: t.contiguous().cpu() for name, t in tensors.items() if t is not None}
    file.write(save(kept, metadata={"domains": "\n".join(sums.domains)}))
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _unchanged(path: Path, version: tuple[int, ...] | None) -> Iterator[None]:
    """A block in which a file is the one that was read, if one was: nobody else writes it."""
    if version_of(path) != version:
        raise _changed(path)
    if version is None:
        yield
        return
    # A network's file system locks only what may be written.
    with path.open("r+b" if os.access(path, os.W_OK) else "rb") as file:
        try:
            alone = try_lock(file)
        except UserError:  # a file system without locks: hours of work are not lost for that
            alone = True
        if not alone or version_of(path) != version:  # another may have come before the lock
            raise _changed(path)
        yield


def _changed(path: Path) -> UserError:
    what = "was changed while the text was read: another process adds domains to it"
    return UserError(str(path), what, "run this again")


def read_sums(path: Path, layers: int, hidden: int) -> Sums | None:
    """The sums in a file of ``--statistics``; ``None``: there is no such file yet.

    Raises:
        UserError: it is no such file, or of a model of another shape.
    """
    if not path.exists():
        check_file(path)
        return None
    try:
        with safe_open(str(path), "pt") as file:
            domains = tuple((file.metadata() or {}).get("domains", "").split("\n"))
            count, first, gram = (file.get_tensor(name) for name in ("count", "first", "gram"))
    except (SafetensorError, OSError) as error:
        what = f"is not a file of router statistics: {error}"
        raise UserError(str(path), what, "give a file that `btx centroids` wrote") from error
    wanted = [(layers, len(domains)), (layers, len(domains), hidden), (layers, hidden, hidden)]
    if [tuple(tensor.shape) for tensor in (count, first, gram)] != wanted:
        what = f"is not of a model with {layers} layers of width {hidden}"
        raise UserError(str(path), what, "give the file made with this model's kind")
    return Sums(domains, count, first, gram)
