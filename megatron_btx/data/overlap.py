"""Runs of 13 words that training and held-out text share: found by hashing, cut from training text.

Thirteen words is the usual criterion of contamination (arXiv 2005.14165, appendix C). Text is split
into words in two ways, both in lower case: at white space, and at everything that is not a letter,
digit or underscore. A run that is shared in either way counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

RUN = 13
"""Words."""
_WORDS = (re.compile(r"\S+"), re.compile(r"\w+"))
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's contribution is shifted out
_MIN_PIECE = 200
"""Characters; shorter parts of a cut document are dropped."""


class HeldOutRuns:
    """The 13-word runs of held-out text as 64-bit hashes.

    A collision of hashes can only cut too much, never too little.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._ids: tuple[dict[str, int], ...] = ({}, {})
        grams: tuple[list[np.ndarray], ...] = ([], [])
        for text in documents:
            lower = text.lower()
            for kind in range(2):
                grams[kind].append(_hashes(self._intern(kind, _WORDS[kind].findall(lower))))
        self._grams: list[np.ndarray] = []
        self._owners: list[np.ndarray] = []
        for found in grams:
            every = np.concatenate([np.empty(0, np.uint64), *found])
            owners = np.repeat(np.arange(len(found), dtype=np.int32), list(map(len, found)))
            unique, first = np.unique(every, return_index=True)
            self._grams.append(unique)
            self._owners.append(owners[first])

    @property
    def is_empty(self) -> bool:
        """Whether there is no run of 13 words in it."""
        return not any(len(grams) for grams in self._grams)

    def save(self, directory: Path) -> None:
        """Write the index to ``directory``, for :meth:`load`."""
        for kind in range(2):
            words = "\n".join(self._ids[kind])
            (directory / f"words.{kind}").write_text(words, "utf-8", newline="\n")
            np.save(directory / f"grams.{kind}.npy", self._grams[kind])
            np.save(directory / f"owners.{kind}.npy", self._owners[kind])

    @classmethod
    def load(cls, directory: Path) -> HeldOutRuns:
        """The index that :meth:`save` wrote; its arrays are memory-mapped and shared by
        processes."""
        self = cls([])
        for kind in range(2):
            words = (directory / f"words.{kind}").read_bytes().decode("utf-8").split("\n")
            self._ids[kind].update((word, i + 1) for i, word in enumerate(words) if word)
            self._grams[kind] = np.load(directory / f"grams.{kind}.npy", mmap_mode="r")
            self._owners[kind] = np.load(directory / f"owners.{kind}.npy", mmap_mode="r")
        return self

    def owner(self, text: str) -> int | None:
        """The number (from 0) of a held-out document with which ``text`` shares a run."""
        lower = text.lower()
        for kind in range(2):
            ids = self._ids[kind]
            words = _WORDS[kind].findall(lower)
            found = np.array([ids.get(word, 0) for word in words], dtype=np.uint64)
            hits = _starts_in(found, self._grams[kind])
            if hits.size:
                first = _hashes(found[hits[0] : hits[0] + RUN])
                return int(self._owners[kind][np.searchsorted(self._grams[kind], first)[0]])
        return None

    def _intern(self, kind: int, words: list[str]) -> np.ndarray:
        ids = self._ids[kind]
        return np.array([ids.setdefault(word, len(ids) + 1) for word in words], dtype=np.uint64)

    def clean(self, text: str) -> Iterator[str]:
        """The parts of ``text`` that share no run with the held-out text; whole lines are cut.

        Yields ``text`` itself if there is nothing to cut.
        """
        lower = text.lower()
        shared: list[tuple[int, int]] = []
        for kind in range(2):
            ids = self._ids[kind]
            # A word that is not in the held-out text is 0: no run with it can be shared.
            found = np.array(
                [ids.get(word, 0) for word in _WORDS[kind].findall(lower)], dtype=np.uint64
            )
            hits = _starts_in(found, self._grams[kind])
            if hits.size:
                spans = [match.span() for match in _WORDS[kind].finditer(lower)]
                shared += [(spans[i][0], spans[i + RUN - 1][1]) for i in hits.tolist()]
        if not shared:
            yield text
            return
        if len(lower) != len(text):  # a few letters change length in lower case: offsets are off
            return
        yield from _pieces(text, shared)

    def shares(self, text: str) -> bool:
        """Whether ``text`` shares a run with the held-out text."""
        return list(self.clean(text)) != [text]


def _hashes(ids: np.ndarray) -> np.ndarray:
    """Hashes of all runs of ``RUN`` consecutive ``ids``, uint64 [len(ids) - RUN + 1]."""
    count = len(ids) - RUN + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for j in range(RUN):
        total = total * _FACTOR + ids[j : j + count]  # wraps around, as meant
    # A polynomial in small numbers leaves high bits plain; mixing makes chance hits improbable.
    total ^= total >> np.uint64(29)
    return total * _FACTOR


def _starts_in(ids: np.ndarray, grams: np.ndarray) -> np.ndarray:
    hashes = _hashes(ids)
    if not hashes.size or not grams.size:
        return np.empty(0, np.int64)
    unknown = np.concatenate([[0], np.cumsum(ids == 0)])
    known = np.flatnonzero(unknown[RUN:] == unknown[:-RUN])  # runs of known words only
    if not known.size:
        return known
    places = np.searchsorted(grams, hashes[known])
    return known[grams[np.minimum(places, grams.size - 1)] == hashes[known]]


def _pieces(text: str, shared: list[tuple[int, int]]) -> Iterator[str]:
    at = 0
    for begin, end in [*sorted(shared), (len(text), len(text))]:
        line_begin = text.rfind("\n", 0, begin) + 1 if begin < len(text) else begin
        piece = text[at:line_begin].strip("\n")
        if len(piece) >= _MIN_PIECE:
            yield piece + "\n"
        line_end = text.find("\n", end)
        at = max(at, len(text) if line_end < 0 else line_end + 1)
