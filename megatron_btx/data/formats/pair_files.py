"""The two files of a Megatron pair, by their names. Imports no NumPy."""

from __future__ import annotations

from pathlib import Path


def is_prefix(path: Path) -> bool:
    """Whether a pair lies at ``path``: a prefix, or either file of the two."""
    prefix = _prefix(path)
    return all(prefix.with_name(prefix.name + end).is_file() for end in (".bin", ".idx"))


def index_file(path: Path) -> Path:
    """The ``.idx`` of the pair at ``path``."""
    prefix = _prefix(path)
    return prefix.with_name(prefix.name + ".idx")


def pair_files(path: Path) -> list[Path]:
    """Both files of the pair at ``path``; none if there is no pair."""
    index = index_file(path)
    return [index.with_name(index.name[:-4] + end) for end in (".bin", ".idx")] * is_prefix(path)


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path
