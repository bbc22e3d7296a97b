"""What the built-in text promises, found by plain sets of tuples instead of hashes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

Run = tuple[str, ...]


def texts(path: Path) -> list[str]:
    """The documents of a JSONL file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def runs(documents: Iterable[str], pattern: str, length: int = 13) -> set[Run]:
    """Every run of ``length`` words; ``pattern`` says what a word is."""
    found = set()
    for text in documents:
        words = re.findall(pattern, text.lower())
        found.update(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return found


def shared(train: Iterable[str], held_out: Iterable[str]) -> set[Run]:
    """Runs of 13 words that both sides have, for either notion of a word."""
    train, held_out = list(train), list(held_out)
    return set().union(
        *(runs(train, pattern) & runs(held_out, pattern) for pattern in (r"\S+", r"\w+"))
    )
