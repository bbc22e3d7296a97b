"""Overlap between training and held-out text: equal documents and runs of 13 words, by document.

Held-out text of all domains is indexed (:class:`~megatron_btx.data.overlap.HeldOutRuns`),
:data:`PASS` bytes at a time, and all cores read the training text and look it up in the index.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from megatron_btx.data import Progress, no_progress
from megatron_btx.data.domain_text import DomainText, texts_of
from megatron_btx.data.formats import Part, format_of, token_pair
from megatron_btx.data.overlap import HeldOutRuns
from megatron_btx.data.parallel import advance, cores, run_all
from megatron_btx.data.shards import cut, split_of
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.files import written
from megatron_btx.recipe.schema import Recipe

PASS = 64 << 20
"""Bytes of held-out text that are indexed at a time; the index takes about eight times as much."""
_SHARD = 16 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A training document that overlaps a held-out one."""

    domain: str
    document: str
    """File and line or row."""
    kind: str
    """``duplicate``: the whole text; ``overlap``: a run of 13 words."""
    heldout_domain: str
    heldout_document: str


@dataclass(frozen=True, slots=True)
class _Source:
    """Some documents of a domain."""

    domain: str
    parts: tuple[Part, ...]
    text_key: str
    split: str | None
    """``train`` or ``valid`` of a domain without ``valid:``; else ``None``, all documents."""


def check_separation(
    recipe: Recipe,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    progress: Progress = no_progress,
) -> Iterator[Found]:
    """Overlaps of the training text of every domain with the held-out text of every domain.

    Args:
        recipe: its domains are read.
        out_dir: of its prepare stage, with the built-in text; need not exist.
        tokenizer_dir: of the tokenizer that decodes Megatron pairs.
        progress: told how far it is.

    Raises:
        UserError: text cannot be read, or there are pairs and no tokenizer.
    """
    texts = list(texts_of(recipe, out_dir).values())
    train = [
        (source, size) for text in texts for source, size in _sources(text, "train", tokenizer_dir)
    ]
    valid = [source for text in texts for source, _ in _sources(text, "valid", tokenizer_dir)]
    for number, (documents, names) in enumerate(_passes(valid, tokenizer_dir)):
        with tempfile.TemporaryDirectory(prefix="btx-held-out-") as place:
            HeldOutRuns(documents).save(Path(place))
            hashes = {_hash(text): i for i, text in reversed(list(enumerate(documents)))}
            documents.clear()
            yield from _search(train, place, hashes, names, tokenizer_dir, number, progress)


def write_clean(
    recipe: Recipe, out_dir: Path, tokenizer_dir: Path | None, shared: Set[str], directory: Path
) -> None:
    """Write ``directory/DOMAIN.jsonl``: the training text of every domain of files, without the
    documents in ``shared`` (by file and line or row)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
    for text in texts_of(recipe, out_dir).values():
        if text.domain.builtin is not None:
            continue
        with written(directory / f"{text.name}.jsonl") as file:
            for source, _ in _sources(text, "train", tokenizer_dir):
                for name, document in _named(source, tokenizer):
                    if name not in shared:
                        line = json.dumps({"text": document}, ensure_ascii=False)
                        file.write(line + "\n")


def _search(
    train: Sequence[tuple[_Source, int]],
    place: str,
    hashes: Mapping[bytes, int],
    names: Sequence[tuple[str, str]],
    tokenizer_dir: Path | None,
    number: int,
    progress: Progress,
) -> Iterator[Found]:
    done, total = 0, max(sum(size for _, size in train), 1)

    def watch(amount: int) -> None:
        nonlocal done
        done += amount
        progress(f"held-out text, part {number + 1}", min(done / total, 0.99))

    sources = [source for source, _ in train]
    workers = min(cores(), len(sources)) if total > _SHARD else 1
    arguments = (place, hashes, tokenizer_dir)
    for index, hits in run_all(
        _compare, sources, workers=workers, setup=_set_up, arguments=arguments, watch=watch
    ):
        for document, kind, owner in hits:
            domain, held_out = names[owner]
            yield Found(
                domain=sources[index].domain,
                document=document,
                kind=kind,
                heldout_domain=domain,
                heldout_document=held_out,
            )


_held_out = HeldOutRuns([])
_hashes: Mapping[bytes, int] = {}
_tokenizer: Tokenizer | None = None


def _set_up(place: str, hashes: Mapping[bytes, int], tokenizer_dir: Path | None) -> None:
    global _held_out, _hashes, _tokenizer
    _held_out, _hashes = HeldOutRuns.load(Path(place)), hashes
    _tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)


def _compare(source: _Source) -> list[tuple[str, str, int]]:
    """(place, kind, number of the held-out document) of what is shared."""
    hits = []
    for part, place, text in _read(source, _tokenizer):
        advance(len(text))
        kind, owner = "duplicate", _hashes.get(_hash(text))
        if owner is None:
            kind, owner = "overlap", _held_out.owner(text)
        if owner is not None:
            hits.append((format_of(part.file).where(part, place), kind, owner))
    return hits


def _sources(
    text: DomainText, split: str, tokenizer_dir: Path | None
) -> Iterator[tuple[_Source, int]]:
    files = text.files(split)
    if text.domain.builtin is not None and not all(file.is_file() for file in files):
        raise UserError(
            f"domains.{text.name}", "is built-in text that is not made yet", "run stage prepare"
        )
    if tokenizer_dir is None and any(format_of(file) is token_pair for file in files):
        raise UserError(
            f"domains.{text.name}",
            "consists of token ids, which only the run's tokenizer can decode",
            "run the prepare stage first",
        )
    for parts, size in cut(files, _SHARD):
        side = split if text.is_split else None
        yield _Source(text.name, parts, text.text_key, side), size


def _read(source: _Source, tokenizer: Tokenizer | None) -> Iterator[tuple[Part, int, str]]:
    for part in source.parts:
        form = format_of(part.file)
        if form is token_pair:
            assert tokenizer is not None  # _sources asked
            pair = token_pair.TokenPair(part.file)
            for place, ids in enumerate(pair.documents(part.begin, part.end)):
                side = split_of(ids[:-1].astype("int32").tobytes())
                if source.split in (None, side):
                    yield part, place, tokenizer.decode(ids[:-1])
            continue
        for place, text in form.read(part, source.text_key):
            if source.split is None or split_of(text.encode()) == source.split:
                yield part, place, text


def _named(source: _Source, tokenizer: Tokenizer | None) -> Iterator[tuple[str, str]]:
    """Each document with its file and line or row."""
    for part, group in groupby(_read(source, tokenizer), lambda one: one[0]):
        form = format_of(part.file)
        yield from ((form.where(part, place), text) for _, place, text in group)


def _passes(
    valid: Sequence[_Source], tokenizer_dir: Path | None
) -> Iterator[tuple[list[str], list[tuple[str, str]]]]:
    """Held-out documents, and the domain and name of each."""
    tokenizer = None if tokenizer_dir is None else load_tokenizer(tokenizer_dir)
    documents: list[str] = []
    names: list[tuple[str, str]] = []
    size = 0
    for source in valid:
        for name, text in _named(source, tokenizer):
            documents.append(text)
            names.append((source.domain, name))
            size += len(text)
            if size >= PASS:
                yield documents, names
                documents, names, size = [], [], 0
    if documents:
        yield documents, names


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
