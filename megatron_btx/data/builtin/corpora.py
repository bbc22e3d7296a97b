"""The built-in corpora: code, prose, mathematics and a broad mix, with nothing to download.

Every source file has one role, drawn from its name and the seed: training or held-out text of the
domain itself, or training or held-out text of the ``general`` mix that the seed model reads. So
held-out documents are split off by file, and the experts' documents are none of the seed's. What
training text still shares with any held-out text, a run of 13 words, is cut (:mod:`.overlap`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_btx.data import Progress, no_progress
from megatron_btx.data.builtin import mathematics
from megatron_btx.data.builtin import text as sources
from megatron_btx.data.documents import read_documents
from megatron_btx.data.overlap import HeldOutRuns
from megatron_btx.data.parallel import advance, cores, run_all
from megatron_btx.errors import UserError
from megatron_btx.files import written

logger = logging.getLogger(__name__)

NAMES = ("general", "code", "math", "prose")
VALID_BYTES = 450_000
"""The most bytes of held-out text of a corpus; a tenth of the training text if that is less."""
_ROLES = {"valid": 0.07, "general/valid": 0.05, "general/train": 0.27, "train": 0.61}
_GENERAL = {"library": 0.18, "packages": 0.17, "prose": 0.35, "math": 0.3}
"""Composition of the broad mix, by bytes. Only the seed reads code from packages."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What was written of one built-in corpus; sizes in bytes of UTF-8."""

    train_documents: int
    train_bytes: int
    valid_documents: int
    valid_bytes: int


def write_builtin(
    directory: str | Path,
    sizes: Mapping[str, int],
    *,
    seed: int,
    progress: Progress = no_progress,
) -> dict[str, Corpus]:
    """Write ``directory/<name>/{train,valid}.jsonl`` for each name of ``sizes``.

    Args:
        directory: where the corpora go.
        sizes: at most so many bytes of training text for each of :data:`NAMES`. Less is written
            where the machine has less.
        seed: names the split and the problems; the same seed on the same machine gives the same
            bytes.
        progress: told how far it is.

    Raises:
        UserError: a name is not one of :data:`NAMES`, or this Python comes without any text.
    """
    for name in sizes:
        if name not in NAMES:
            raise UserError(f"domains: builtin: {name}", "is no built-in corpus",
                            f"use one of {', '.join(NAMES)}")  # fmt: skip
    library = _Library(seed)
    valid = {
        name: list(_take(library.documents(name, "valid"), min(VALID_BYTES, max(size // 10, 1))))
        for name, size in sizes.items()
    }
    held_out = HeldOutRuns(chain.from_iterable(valid.values()))

    trains = _write_training(Path(directory), sizes, library, held_out, progress)
    if trains.get("general", (0, 0))[0]:
        others = [name for name, (documents, _) in trains.items() if documents]
        others.remove("general")
        trains["general"] = _without(Path(directory), "general", others)
    corpora = {}
    for name, train in trains.items():
        held = write_jsonl(Path(directory, name, "valid.jsonl"), valid[name])
        if not train[0] or not held[0]:
            raise UserError(
                f"domains: builtin: {name}",
                "this Python comes without the text of which it is made",
                "use a Python with the sources of its standard library, or give files instead",
            )
        corpora[name] = Corpus(*train, *held)
        logger.info("built-in %s: %s", name, corpora[name])
    return corpora


_shared: list[Any] = []
"""State of every process that writes a corpus: the library and the held-out text."""


def _share(*what: Any) -> None:
    _shared[:] = what


def _write_training(
    directory: Path,
    sizes: Mapping[str, int],
    library: _Library,
    held_out: HeldOutRuns,
    progress: Progress,
) -> dict[str, tuple[int, int]]:
    """``{name: (documents, bytes)}``. Side by side, where a fork is safe: a process with torch in
    it holds threads and locks that a fork breaks."""
    done, total = 0, max(sum(sizes.values()), 1)

    def watch(amount: int) -> None:
        nonlocal done
        done += amount
        progress("built-in text", min(done / total, 1.0))

    tasks = [(directory, name, size) for name, size in sizes.items()]
    workers = 1 if "torch" in sys.modules else min(cores(), len(tasks))
    arguments = (library, held_out)
    results = dict(
        run_all(
            _write_one,
            tasks,
            workers=workers,
            setup=_share,
            arguments=arguments,
            watch=watch,
            start="fork",
        )  # fmt: skip
    )
    return {name: results[i] for i, name in enumerate(sizes)}


def _write_one(task: tuple[Path, str, int]) -> tuple[int, int]:
    directory, name, size = task
    library, held_out = _shared
    cleaned = chain.from_iterable(map(held_out.clean, library.branch().documents(name, "train")))
    return write_jsonl(directory / name / "train.jsonl", _take(cleaned, size, advance))


def _without(directory: Path, name: str, others: Sequence[str]) -> tuple[int, int]:
    """Drop from a corpus the documents that others hold too: packages repeat their documentation,
    and the seed and the experts are to see different documents. (documents, bytes) of the rest."""
    theirs = {
        text for other in others for text in read_documents([directory / other / "train.jsonl"])
    }
    path = directory / name / "train.jsonl"
    return write_jsonl(path, [text for text in read_documents([path]) if text not in theirs])


def write_jsonl(path: Path, documents: Iterable[str]) -> tuple[int, int]:
    """Write ``documents`` to ``path``, whole or not at all; returns (documents, bytes of text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with written(path) as out:
        for document in documents:
            out.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            count += 1
            size += len(document.encode())
    return count, size


def _take(
    documents: Iterable[str], size: int, watch: Callable[[int], None] = lambda taken: None
) -> Iterator[str]:
    """Documents up to ``size`` bytes; one that is too long for the rest is skipped."""
    left, misses = size, 0
    for document in documents:
        length = len(document.encode())
        if length <= left:
            yield document
            left -= length
            watch(length)
        elif (misses := misses + 1) > 50 or left < 200:
            return


class _Library:
    """The documents of every corpus and split, in an order drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._prose = sources.Prose()
        self._listed: dict[str, list[sources.SourceFile]] = {}

    def branch(self) -> _Library:
        """A copy with the same paragraphs extracted so far, independent from then on.

        So that each corpus is the same whether they are made one by one or side by side.
        """
        other = _Library(self._seed)
        other._prose = self._prose.copy()
        other._listed = self._listed
        return other

    def documents(self, name: str, split: str) -> Iterator[str]:
        """The documents of corpus ``name``: endless for math, what there is for the others."""
        if name != "general":
            return self._of_kind(name, split)
        role = f"general/{split}"
        streams = {
            "library": self._of_kind("code", role),
            "packages": self._package_code(role),
            "prose": self._of_kind("prose", role),
            "math": self._of_kind("math", role),
        }
        return _in_proportion(streams, _GENERAL)

    def _of_kind(self, kind: str, role: str) -> Iterator[str]:
        if kind == "math":
            return mathematics.problems(f"{self._seed}/math/{role}")
        return self._code(role) if kind == "code" else self._english(role)

    def _code(self, role: str) -> Iterator[str]:
        modules = self._sources("stdlib", sources.stdlib_sources, role)
        yield from filter(None, (sources.code(source.read()) for source in modules))
        # Python's own test suite, where it is installed, is second best.
        tests = self._sources("tests", lambda: sources.stdlib_sources(tests=True), role)
        yield from filter(None, (sources.code(source.read()) for source in tests))

    def _package_code(self, role: str) -> Iterator[str]:
        for source in self._sources("packages", sources.package_sources, role):
            if text := sources.code_without_docstrings(source.read()):
                yield text

    def _english(self, role: str) -> Iterator[str]:
        for name, text in sources.documentation():
            place = sources.SourceFile(name, Path()).order(self._seed)
            if _role(place) == role and (prose := self._prose.of_texts([text])):
                yield prose
        for source in self._sources("packages", sources.package_sources, role):
            if prose := self._prose.of_module(source.read()):
                yield prose

    def _sources(
        self, name: str, find: Callable[[], list[sources.SourceFile]], role: str
    ) -> Iterator[sources.SourceFile]:
        if name not in self._listed:
            self._listed[name] = sorted(find(), key=lambda source: source.order(self._seed))
        return (s for s in self._listed[name] if _role(s.order(self._seed)) == role)


def _role(order: int) -> str:
    at = order / 2**64
    for role, share in _ROLES.items():
        at -= share
        if at < 0:
            return role
    return "train"


def _in_proportion(streams: dict[str, Iterator[str]], shares: Mapping[str, float]) -> Iterator[str]:
    """Documents so that the bytes of each stream keep to its share while it lasts."""
    taken = dict.fromkeys(streams, 0)
    while taken.keys() - {"math"}:  # which never ends, and alone is no mix
        name = min(taken, key=lambda n: taken[n] / shares[n])
        document = next(streams[name], None)
        if document is None:
            del taken[name]
        else:
            taken[name] += len(document.encode())
            yield document
