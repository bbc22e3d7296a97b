"""What a run has of one split of a domain, and where. Imports neither torch nor NumPy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_btx.files import find_json, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One split of a domain, or one of the pairs that make it up."""

    key: str
    """Hash of what it was made from."""
    documents: int
    tokens: int
    """An end-of-document token after each document included."""
    bytes: int | None
    """UTF-8 bytes of text; ``None``: not known, of training text that came as ids."""
    sha256: str
    """Of the ``.bin`` file; of several pairs, or one in place, of their content otherwise."""
    prefix: str | None = None
    """Of a pair of the user's, which stays where it is."""
    blend: tuple[tuple[str, float], ...] = ()
    """Of several pairs: their names in this directory, and the share of samples of each."""


def write_piece(prefix: Path, piece: Piece) -> Piece:
    """Write ``prefix.json``; what says nothing is left out."""
    content = {name: value for name, value in asdict(piece).items() if value or name == "bytes"}
    write_json(beside(prefix, "json"), content)
    return piece


def read_piece(prefix: str | Path, key: str | None = None) -> Piece | None:
    """The finished piece at ``prefix``; ``None`` if it isn't finished or was made from other things
    (``key``)."""
    prefix = Path(prefix)
    try:
        found = find_json(beside(prefix, "json")) or {}
        blend = tuple((str(name), float(share)) for name, share in found.pop("blend", ()))
        piece = Piece(**{"documents": 0, "tokens": 0, **found}, blend=blend)
    except (ValueError, TypeError):
        return None
    if key is not None and piece.key != key:
        return None
    if piece.blend:
        parts = [read_piece(prefix.with_name(name)) for name, _ in piece.blend]
        return piece if all(parts) else None
    there = prefix if piece.prefix is None else Path(piece.prefix)
    return piece if _is_whole(there, piece.tokens) else None


def _is_whole(prefix: Path, tokens: int) -> bool:
    """Whether both files of a pair are there, the ids as long as so many tokens are."""
    try:
        size = os.stat(beside(prefix, "bin")).st_size
        os.stat(beside(prefix, "idx"))
    except OSError:
        return False
    return size in [width * tokens for width in (1, 2, 4, 8)]


def pairs(prefix: Path, piece: Piece) -> list[tuple[Path, float]]:
    """The pairs of the piece at ``prefix``, and the share of samples of each."""
    if not piece.blend:
        return [(prefix if piece.prefix is None else Path(piece.prefix), 1.0)]
    found = []
    for name, share in piece.blend:
        part = read_piece(prefix.with_name(name))
        assert part is not None  # read_piece looked
        found.append((pairs(prefix.with_name(name), part)[0][0], share))
    return found


def beside(prefix: Path, suffix: str) -> Path:
    """``prefix.suffix``: a prefix may have dots of its own."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def are_there(directory: Path, domains: object) -> bool:
    """Whether ``directory`` (``prepare/data``) holds every piece that a preparation says it has
    made: domain -> split -> facts."""
    if not isinstance(domains, Mapping):
        return False
    wanted = [(str(name), split) for name, splits in domains.items() for split in _names(splits)]
    return all(read_piece(directory / name / split) is not None for name, split in wanted)


def _names(splits: Any) -> list[str]:
    return [str(split) for split in splits] if isinstance(splits, Mapping) else []
