"""The ``prepare`` stage: text to token files.

    prepare/corpus/<name>/{train,valid}.jsonl      built-in text, where a domain asks for it
    prepare/tokenizer/
    prepare/data/<domain>/{train,valid}.{bin,idx,json}
    prepare/data.json                              what there is of each domain

Every piece carries a hash of what it was made from and is kept as long as that holds, so a stage
that was killed goes on where it was, and one changed domain costs only itself.

A domain whose recipe names no ``valid`` files is split: one document in fifty is held out, chosen
by the hash of its text, so that the same text never is on both sides.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_btx.data import Progress, no_progress, tokenize
from megatron_btx.data.builtin.corpora import write_builtin
from megatron_btx.data.documents import find_files, no_document
from megatron_btx.data.domain_text import SPLITS, DomainText, digest, document_hash, find
from megatron_btx.data.formats import Part, format_of, json_lines, token_pair
from megatron_btx.data.formats.compression import compression_of
from megatron_btx.data.indexed import read_piece
from megatron_btx.data.tokenizer import (
    HuggingFace,
    SentencePiece,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.families.tokenizer_files import place_of
from megatron_btx.families.tokenizer_identity import differences
from megatron_btx.files import find_json, sweep, unfinished, write_json
from megatron_btx.recipe.schema import Recipe, TokenizerBlock
from megatron_btx.weights.find_checkpoint import find_checkpoint

logger = logging.getLogger(__name__)

_TOLD = ("key", "documents", "tokens", "bytes", "sha256")


def prepare(
    recipe: Recipe, out_dir: str | Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Make tokenizer and token files of every domain in ``out_dir``.

    Returns:
        ``{"tokenizer": {...}, "domains": {name: {"train": {...}, "valid": {...}}}}`` with
        documents, tokens, bytes, sha256 and sources of each; also written to ``data.json``.

    Raises:
        UserError: text or tokenizer is missing or unusable; the message names file and line.
    """
    out_dir = Path(out_dir)
    sources = find(recipe)
    _check_trainable(recipe)
    sweep(out_dir)
    _write_corpora(recipe, out_dir / "corpus", progress)
    texts = {name: DomainText(name, domain, sources[name], out_dir) for name, domain in
             recipe.domains.items()}  # fmt: skip
    tokenizer = _tokenizer(recipe, texts, out_dir / "tokenizer", progress)
    domains = _index(texts, tokenizer, out_dir / "data", progress)
    for name, splits in domains.items():
        for split, piece in splits.items():
            if piece["tokens"] <= recipe.model.seq_length:
                raise UserError(
                    f"domains.{name}.{split}",
                    f"holds {piece['tokens']} tokens, less than one sequence and a token "
                    f"({recipe.model.seq_length} + 1)",
                    "give it more text, or lower model.seq_length",
                )
    described = {**tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    summary = {"tokenizer": described, "domains": domains}
    write_json(out_dir / "data.json", summary)
    return summary


def check(recipe: Recipe, *, most: int = 256_000_000) -> None:
    """Read users' text before anything is written: every file, and of each up to ``most`` bytes.

    Also the tokenizer that the recipe names. Imports no torch, writes nothing.

    Raises:
        UserErrors: all that is wrong, with file and line.
    """
    errors: list[UserError] = []
    if recipe.tokenizer.path is not None:
        with collect_errors(errors):
            path, wanted = recipe.tokenizer.path, recipe.tokenizer.vocab_size
            size = read_tokenizer(path, recipe.tokenizer.type, where="tokenizer.path").vocab_size
            if size > wanted and recipe.seed.from_ is None:
                raise UserError(
                    "tokenizer.vocab_size",
                    f"the tokenizer {path} has {size} tokens, the vocabulary {wanted}",
                    f"set `vocab_size: {size}`, or give a smaller tokenizer",
                )
    for name, domain in recipe.domains.items():
        for split, paths in (("train", domain.train), ("valid", domain.valid)):
            with collect_errors(errors):
                for file in find_files(paths, where=f"domains.{name}.{split}"):
                    with collect_errors(errors):
                        _read_ahead(file, domain.text_key, most)
    if not errors:
        with collect_errors(errors):
            find(recipe)
            _check_trainable(recipe)
    if errors:
        raise UserErrors(errors)


def _check_trainable(recipe: Recipe) -> None:
    """That there is text where a tokenizer is to be trained."""
    if recipe.tokenizer.path is not None or recipe.seed.from_ is not None:
        return
    for name in recipe.seed.data or recipe.domains:
        for path in recipe.domains[name].train:
            files = find_files([path], where=f"domains.{name}.train")
            if any(format_of(file) is token_pair for file in files):
                raise UserError(
                    "tokenizer.path",
                    f"has to be given: {path} of domain {name} is token ids, not text",
                    "give the tokenizer that made them",
                )


def _read_ahead(file: Path, text_key: str, most: int) -> None:
    form = format_of(file)
    if form is token_pair:
        token_pair.TokenPair(file)
        return
    part = Part(file, 0, most if form is json_lines else None)
    left, count = most, 0
    for _, document in form.read(part, text_key):
        left, count = left - len(document), count + 1
        if left < 0:
            return
    whole = form is not json_lines or (not compression_of(file) and file.stat().st_size < most)
    if whole and not count:
        raise no_document(file)


def prefix(run_dir: str | Path, domain: str, split: str) -> Path:
    """Where the token files of a domain are, without ``.bin`` and ``.idx``."""
    return Path(run_dir) / "prepare" / "data" / domain / split


def _write_corpora(recipe: Recipe, directory: Path, progress: Progress) -> None:
    sizes: dict[str, int] = {}
    for domain in recipe.domains.values():
        if domain.builtin is not None:
            sizes[domain.builtin] = max(sizes.get(domain.builtin, 0), domain.builtin_bytes)
    if not sizes:
        return
    # All of them together: what is held out of one is kept out of every other.
    made, key = directory / "made.json", digest([sizes, recipe.random_seed])
    if _read_json(made).get("key") == key:
        return
    made.unlink(missing_ok=True)
    corpora = write_builtin(directory, sizes, seed=recipe.random_seed, progress=progress)
    write_json(made, {"key": key, **{name: asdict(corpus) for name, corpus in corpora.items()}})


def _tokenizer(
    recipe: Recipe, texts: dict[str, DomainText], directory: Path, progress: Progress
) -> Tokenizer:
    wanted, seed = recipe.tokenizer, recipe.seed.from_
    given: Tokenizer | None = None
    if wanted.path is not None:
        given = read_tokenizer(wanted.path, wanted.type, where="tokenizer.path")
    if seed is not None:
        given = _seeds_tokenizer(Path(seed), given, wanted.path)
    if given is not None:
        key = given.sha256
    else:
        readers = {name: texts[name] for name in recipe.seed.data or texts}
        key = digest([wanted.vocab_size, wanted.train_bytes, sorted(readers),
                       [readers[name].key("train") for name in sorted(readers)]])  # fmt: skip
    if _read_json(directory / "made.json").get("key") == key:
        return load_tokenizer(directory)
    progress("tokenizer", 0.0)
    tokenizer = given or _trained(readers, wanted)
    temporary = unfinished(directory)
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    write_json(temporary / "made.json", {"key": key})
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(temporary, directory)
    progress("tokenizer", 1.0)
    return load_tokenizer(directory)


def _trained(texts: dict[str, DomainText], wanted: TokenizerBlock) -> Tokenizer:
    errors: list[UserError] = []

    def documents() -> Iterator[str]:
        with collect_errors(errors):  # SentencePiece makes of any error one of its own
            yield from _sample(texts, wanted.train_bytes)

    try:
        return train_tokenizer(documents(), wanted.vocab_size, where="tokenizer.vocab_size")
    finally:
        if errors:
            raise errors[0]


def _seeds_tokenizer(seed: Path, given: Tokenizer | None, path: str | None) -> Tokenizer:
    """The tokenizer that lies beside the seed's weights, or the one given at ``path``, if it fits
    them. The seed is a checkpoint of Megatron's or a Hugging Face directory."""
    checkpoint = find_checkpoint(seed)
    theirs = None
    if (checkpoint / "tokenizer").is_dir():
        theirs = load_tokenizer(checkpoint / "tokenizer")
    elif (checkpoint / HuggingFace.file).is_file():
        theirs = read_tokenizer(checkpoint, HuggingFace.type, where="seed.from")
    elif (checkpoint / SentencePiece.file).is_file():
        theirs = read_tokenizer(checkpoint, SentencePiece.type, where="seed.from")
    tokenizer = given or theirs
    if tokenizer is None:
        raise UserError(
            "seed.from",
            f"{checkpoint} comes without its tokenizer",
            "give the tokenizer it was trained with as tokenizer.path",
        )
    unlike = differences(place_of(checkpoint), Path(path)) if theirs and path else []
    if unlike:
        raise UserError(
            "tokenizer.path",
            "is not the tokenizer that the seed was trained with (seed.from): " + "; ".join(unlike),
            "leave tokenizer.path out: the seed's own is taken",
        )
    manifest = _read_json(checkpoint / "manifest.json") or _read_json(checkpoint / "config.json")
    size = manifest.get("vocab_size")
    if size is not None:
        check_vocabulary(tokenizer, size, where="tokenizer.path")
    return tokenizer


def _sample(texts: dict[str, DomainText], size: int) -> Iterator[str]:
    """About ``size`` bytes of training text, the same from each domain, spread over its files."""
    quota = size // len(texts)
    for text in texts.values():
        share = min(1.0, 1.1 * quota / max(text.size(), 1))
        left = quota
        for document in text.documents("train"):
            if share < 1 and document_hash(document) % 1000 >= 1000 * share:
                continue
            yield document
            left -= len(document.encode())
            if left <= 0:
                break


def _index(
    texts: dict[str, DomainText], tokenizer: Tokenizer, directory: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {name: {} for name in texts}
    jobs = [job for name, text in texts.items() for job in tokenize.jobs(text, directory / name)]
    tokenize.run(jobs, directory.with_name("tokenizer"), tokenizer, progress)
    for name, text in texts.items():
        for split in SPLITS:
            mine = [job for job in jobs if job.domain == name and split in job.splits]
            piece = tokenize.finish(text, split, mine, directory / name)
            logger.info("%s %s: %s", name, split, piece)
            content = {key: value for key, value in asdict(piece).items() if key in _TOLD}
            if piece.blend:
                parts = [read_piece(directory / name / part) for part, _ in piece.blend]
                content["blend"] = [
                    [part.tokens, share]
                    for part, (_, share) in zip(parts, piece.blend, strict=True)
                    if part is not None
                ]
            result[name][split] = {**content, "sources": text.sources(split)}
    progress("tokens", 1.0)
    return result


def _read_json(path: Path) -> dict[str, Any]:
    """What there is; nothing where there is no whole file."""
    return find_json(path) or {}
