"""``hashes.json``: the hash of each file of a checkpoint, written with it, checked when it is read.

XXH3 of 128 bits finds damage (a flipped bit, a lost block, another step's file) at the speed of
memory, some ten times that of SHA-256. It is no defence against an attacker, who could
write ``hashes.json`` anew: against that, nothing in a checkpoint is run (safe_unpickle.py).
``mix.json`` says which sources a mix was made of by SHA-256. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import xxhash

from megatron_btx.errors import UserError, shown
from megatron_btx.files import read_json

HASHES = "hashes.json"
ALGORITHM = "xxh3_128"

_AGAIN = "copy the checkpoint again, or take an earlier step"
_ON_PURPOSE = f"{_AGAIN}; where it was changed on purpose, delete its line in {HASHES}"

_EDITED = (".json", ".jinja", ".txt", ".md", ".yaml", ".yml")

Hash = xxhash.xxh3_128


def hash_file(path: Path) -> str:
    """Hash of a file's content, as hexadecimal digits."""
    digest, buffer = Hash(), bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def hashes_json(hashes: Mapping[str, str]) -> bytes:
    """The content of ``hashes.json``: file (relative to the directory, ``/`` between its parts) ->
    hash."""
    files = dict(sorted(hashes.items()))
    return (json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1) + "\n").encode()


def files_of(directory: Path) -> list[str]:
    """The regular files in a directory and below, but for ``hashes.json``, by relative name."""
    found = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(directory)) for path in found if path.name != HASHES)


def hashes_of(directory: Path) -> dict[str, str]:
    """What a checkpoint's ``hashes.json`` says; empty where it has none (older, or of others).

    Raises:
        UserError: the file is damaged, or of a newer version.
    """
    path = directory / HASHES
    if not os.path.lexists(path):
        return {}
    content = read_json(path)
    files = content.get("files")
    if content.get("algorithm") != ALGORITHM or not isinstance(files, dict):
        what = f"holds no hashes of the algorithm {ALGORITHM}"
        raise UserError(str(path), what, "update megatron-btx, or copy the checkpoint again")
    for name, value in files.items():
        parts = PurePosixPath(name)
        if not isinstance(value, str) or parts.is_absolute() or ".." in parts.parts:
            raise UserError(str(path), f"the line of {shown(name)} is damaged", _AGAIN)
    return files


def is_edited(name: str) -> bool:
    """Whether people change such files by hand (config.json, a chat template): a difference is told
    where the checkpoint is used, and refused only where it is resumed or verified."""
    return name.endswith(_EDITED)


def difference(path: Path, wanted: str, found: str | None = None) -> UserError | None:
    """What is wrong with one file, if anything.

    Args:
        path: of the file.
        wanted: its hash when it was written.
        found: its hash now, where that is known already.
    """
    if not path.is_file():
        return UserError(str(path), f"is missing, and {HASHES} names it", _ON_PURPOSE)
    if (found or hash_file(path)) == wanted:
        return None
    what = f"is not what was written: its hash differs from the one in {HASHES}"
    return UserError(str(path), what, _ON_PURPOSE)
