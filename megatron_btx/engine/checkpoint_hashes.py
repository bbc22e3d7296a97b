"""Checkpoints that Megatron-Core saves and loads: hashed and compared by all ranks together, and
unpickled by the allow-list.

Each file is read by one rank. What one rank finds is an error on every rank.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem

from megatron_btx.errors import UserError, UserErrors, capped, collect_errors
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.file_hashes import HASHES, difference, hashes_of

_OWN = re.compile(r"__(\d+)_\d+\.distcp")
_LISTED = {**safe_unpickle.METADATA_NAMES, **safe_unpickle.COMMON_NAMES}


def check_hashes(directory: Path, only: Iterable[str] | None = None) -> None:
    """Compare a checkpoint's files with its ``hashes.json``, where it has one. Every rank calls it.

    Args:
        directory: of the checkpoint.
        only: names of the files to look at; ``None``: all.

    Raises:
        UserErrors: files that are gone or are not what was written; on every rank.
    """
    errors: list[UserError] = []
    with collect_errors(errors):
        hashes = hashes_of(directory)
        names = sorted(hashes if only is None else hashes.keys() & set(only))
        for name in _share(names):
            try:
                error = difference(directory / name, hashes[name])
            except OSError as unread:
                error = UserError(str(directory / name), f"cannot be read: {unread.strerror}")
            errors += [error] if error else []
    found = [error for part in _all_ranks(errors) for error in part]
    if found:
        raise UserErrors(capped(list({str(error): error for error in found}.values())))


def _share(names: list[str]) -> list[str]:
    """The files that this rank checks: those that it wrote, still in its machine's memory, and its
    share of the others."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    written = {name: int(match[1]) for name in names if (match := _OWN.fullmatch(name))}
    owner = {name: written.get(name, at) % world for at, name in enumerate(names)}
    return [name for name in names if owner[name] == rank]


def _all_ranks(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def guarded(directory: Path) -> Iterator[None]:
    """Whatever torch unpickles inside is of listed names only, and of bounded size: ``.metadata``,
    the objects in ``.distcp`` files, ``common.pt``. Where the checkpoint has no ``hashes.json``,
    the CRC-32 in each archive is compared, on the bytes that are loaded.
    """
    unpickled = safe_unpickle.Pickles(directory, _LISTED)
    check_crc = not (directory / HASHES).exists()
    metadata = safe_unpickle.Pickles(directory / ".metadata", safe_unpickle.METADATA_NAMES)
    with (
        mock.patch.object(torch, "load", _load(torch.load, unpickled, directory, check_crc)),
        mock.patch.object(filesystem, "pickle", SimpleNamespace(load=metadata.load)),
    ):
        yield


def _load(
    plain: Callable[..., Any], unpickled: safe_unpickle.Pickles, directory: Path, check_crc: bool
) -> Callable[..., Any]:
    def load(file: Any, *arguments: Any, weights_only: bool | None = None, **options: Any) -> Any:
        path = getattr(getattr(file, "base_stream", file), "name", file)
        where = str(path if isinstance(path, (str, Path)) else directory)
        if check_crc:
            file = io.BytesIO(file.read() if hasattr(file, "read") else Path(file).read_bytes())
            _check_crc(file, where)
        if weights_only is False:
            options["pickle_module"] = unpickled
        try:
            return plain(file, *arguments, weights_only=weights_only is not False, **options)
        except pickle.UnpicklingError as error:
            said = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()[0]
            what = f"is damaged, or its pickle names something outside the allow-list: {said}"
            fix = "do not use it unless you know who wrote it"
            raise UserError(where, what, fix) from None

    return load


def _check_crc(file: io.BytesIO, where: str) -> None:
    again = "copy the checkpoint again, or take an earlier step"
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # zero: saved without
                    archive.read(entry)
    except Exception as error:  # zipfile raises whatever a damaged archive makes it raise
        raise UserError(where, f"truncated or corrupt: {error}", again) from error
    file.seek(0)
