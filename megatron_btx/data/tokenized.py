"""The record of a tokenized split (``prefix.json``): its ``.bin``/``.idx`` pairs, how many
documents and tokens they hold, and what they were made from. Imports neither torch nor NumPy."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_btx.files import find_json, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedSplit:
    """A domain's training or held-out text as ids, or one of the pairs that make it up."""

    key: str
    """Hash of its inputs."""
    documents: int
    tokens: int
    """Including an end-of-document token after each document."""
    bytes: int | None
    """UTF-8 bytes of text; ``None`` if unknown, for training text that was given as ids."""
    sha256: str
    """Of the ``.bin`` file; for several pairs, or a pair that is used in place, of their hashes or
    ids."""
    prefix: str | None = None
    """Of a pair of the user's that is used in place."""
    blend: tuple[tuple[str, float], ...] = ()
    """If there are several pairs: their names in this directory, and each one's share of
    samples."""


def write_tokenized(prefix: Path, made: TokenizedSplit) -> TokenizedSplit:
    """Write ``prefix.json``, without empty fields."""
    content = {name: value for name, value in asdict(made).items() if value or name == "bytes"}
    write_json(beside(prefix, "json"), content)
    return made


def read_tokenized(prefix: str | Path, key: str | None = None) -> TokenizedSplit | None:
    """The finished split at ``prefix``; ``None`` if it is unfinished or its key is not ``key``."""
    prefix = Path(prefix)
    try:
        found = find_json(beside(prefix, "json")) or {}
        blend = tuple((str(name), float(share)) for name, share in found.pop("blend", ()))
        made = TokenizedSplit(**{"documents": 0, "tokens": 0, **found}, blend=blend)
    except (ValueError, TypeError):
        return None
    if key is not None and made.key != key:
        return None
    if made.blend:
        parts = [read_tokenized(prefix.with_name(name)) for name, _ in made.blend]
        return made if all(parts) else None
    there = prefix if made.prefix is None else Path(made.prefix)
    return made if _is_whole(there, made.tokens) else None


def _is_whole(prefix: Path, tokens: int) -> bool:
    """Whether both files of a pair exist and the ``.bin`` has the size of ``tokens`` ids."""
    try:
        size = os.stat(beside(prefix, "bin")).st_size
        os.stat(beside(prefix, "idx"))
    except OSError:
        return False
    return size in [width * tokens for width in (1, 2, 4, 8)]


def pairs(prefix: Path, made: TokenizedSplit) -> list[tuple[Path, float]]:
    """The pairs of the split at ``prefix`` that hold text: their prefixes, and each one's share of
    samples."""
    if not made.blend:
        return [(prefix if made.prefix is None else Path(made.prefix), 1.0)]
    found = []
    for name, share in made.blend:
        part = read_tokenized(prefix.with_name(name))
        assert part is not None  # read_tokenized looked
        if part.tokens:  # else there is nothing to map, and Megatron takes no weight of 0
            found.append((pairs(prefix.with_name(name), part)[0][0], share))
    return found


def beside(prefix: Path, suffix: str) -> Path:
    """``prefix.suffix``: a prefix may have dots of its own."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def all_tokenized(directory: Path, domains: object) -> bool:
    """Whether ``directory`` (``prepare/data``) holds every split that a preparation says it has
    made: domain -> split -> facts."""
    if not isinstance(domains, Mapping):
        return False
    wanted = [(str(name), split) for name, splits in domains.items() for split in _names(splits)]
    return all(read_tokenized(directory / name / split) is not None for name, split in wanted)


def _names(splits: Any) -> list[str]:
    return [str(split) for split in splits] if isinstance(splits, Mapping) else []
