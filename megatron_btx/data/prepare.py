"""The ``prepare`` stage: text to token files.

    prepare/corpus/<name>/{train,valid}.jsonl      built-in text, if a domain uses it
    prepare/tokenizer/
    prepare/data/<domain>/{train,valid}.{bin,idx,json}
    prepare/data.json                              documents, tokens and bytes of each domain

Every tokenized split records a hash of its inputs and is kept as long as that is the same: a stage
that was killed continues, and a change to one domain repeats that domain alone.

Of a domain without ``valid`` files one document in fifty is held out, chosen by the hash of its
text, so that equal documents are on the same side.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_btx.data import Progress, no_progress, tokenize
from megatron_btx.data.builtin.corpora import write_builtin
from megatron_btx.data.documents import find_files, no_document
from megatron_btx.data.domain_text import SPLITS, DomainText, digest, find, texts_of
from megatron_btx.data.formats import Part, format_of, json_lines, token_pair
from megatron_btx.data.formats.compression import compression_of
from megatron_btx.data.run_tokenizer import check_trainable, make_tokenizer
from megatron_btx.data.tokenized import TokenizedSplit, pairs, read_tokenized
from megatron_btx.data.tokenizer import Tokenizer, load_tokenizer, read_tokenizer
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.files import find_json, sweep, write_json
from megatron_btx.recipe.schema import Recipe

logger = logging.getLogger(__name__)

_TOLD = ("key", "documents", "tokens", "bytes", "sha256")


def prepare(
    recipe: Recipe, out_dir: str | Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Make the tokenizer, and the token files of every domain, in ``out_dir``.

    Returns:
        ``{"tokenizer": {...}, "domains": {name: {"train": {...}, "valid": {...}}}}`` with
        documents, tokens, bytes, sha256 and sources of each split; also written to
        ``data.json``.

    Raises:
        UserError: text or tokenizer is missing or unusable; the message names file and line.
    """
    out_dir = Path(out_dir)
    texts, tokenizer = _begin(recipe, out_dir, progress)
    domains = _index(texts, tokenizer, out_dir / "data", progress)
    for name, splits in domains.items():
        for split, made in splits.items():
            if made["tokens"] <= recipe.model.seq_length:
                raise UserError(
                    f"domains.{name}.{split}",
                    f"holds {made['tokens']} tokens, less than one sequence and a token "
                    f"({recipe.model.seq_length} + 1)",
                    "give it more text, or lower model.seq_length",
                )
    described = {**tokenizer.describe(), "vocab_size": tokenizer.vocab_size}
    summary = {"tokenizer": described, "domains": domains}
    write_json(out_dir / "data.json", summary)
    return summary


def begin(recipe: Recipe, out_dir: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """The first part of :func:`prepare`: built-in text and the tokenizer.

    Returns:
        ``{"tokenizer": its description}``.

    Raises:
        UserError: as for :func:`prepare`.
    """
    _, tokenizer = _begin(recipe, out_dir, progress)
    return {"tokenizer": tokenizer.describe()}


def make_share(
    recipe: Recipe, out_dir: Path, number: int, of: int, progress: Progress = no_progress
) -> dict[str, int]:
    """Tokenize one share of the shards, after :func:`begin` and before :func:`prepare`, which joins
    the finished shards and makes missing ones.

    Args:
        recipe: the run's.
        out_dir: of the prepare stage.
        number: of the share, from 0.
        of: how many shares there are.
        progress: told how far it is.

    Returns:
        ``{"shards": how many were in the share}``.

    Raises:
        UserError: as for :func:`prepare`.
    """
    place = out_dir / "tokenizer"
    jobs = _jobs(texts_of(recipe, out_dir), out_dir / "data")
    made = tokenize.run(jobs, place, load_tokenizer(place), progress, share=(number, of))
    return {"shards": made}


def _begin(
    recipe: Recipe, out_dir: Path, progress: Progress
) -> tuple[dict[str, DomainText], Tokenizer]:
    texts = texts_of(recipe, out_dir)
    check_trainable(recipe)
    sweep(out_dir)
    _write_corpora(recipe, out_dir / "corpus", progress)
    return texts, make_tokenizer(recipe, texts, out_dir / "tokenizer", progress)


def check(recipe: Recipe, *, most: int = 256_000_000) -> None:
    """Check users' text and tokenizer before a run: reads every file, up to ``most`` bytes of each.
    Imports no torch, writes nothing.

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
            check_trainable(recipe)
    if errors:
        raise UserErrors(errors)


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
    """The path of a domain's token files without ``.bin`` and ``.idx``."""
    return Path(run_dir) / "prepare" / "data" / domain / split


def _write_corpora(recipe: Recipe, directory: Path, progress: Progress) -> None:
    sizes: dict[str, int] = {}
    for domain in recipe.domains.values():
        if domain.builtin is not None:
            sizes[domain.builtin] = max(sizes.get(domain.builtin, 0), domain.builtin_bytes)
    if not sizes:
        return
    # Made together: the held-out text of each is kept out of all the others.
    made, key = directory / "made.json", digest([sizes, recipe.random_seed])
    if (find_json(made) or {}).get("key") == key:
        return
    made.unlink(missing_ok=True)
    corpora = write_builtin(directory, sizes, seed=recipe.random_seed, progress=progress)
    write_json(made, {"key": key, **{name: asdict(corpus) for name, corpus in corpora.items()}})


def _index(
    texts: dict[str, DomainText], tokenizer: Tokenizer, directory: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {name: {} for name in texts}
    jobs = _jobs(texts, directory)
    tokenize.run(jobs, directory.with_name("tokenizer"), tokenizer, progress)
    for name, text in texts.items():
        for split in SPLITS:
            mine = [job for job in jobs if job.domain == name and split in job.splits]
            made = tokenize.finish(text, split, mine, directory / name)
            logger.info("%s %s: %s", name, split, made)
            content = {key: value for key, value in asdict(made).items() if key in _TOLD}
            if made.blend:
                parts = [read_tokenized(directory / name / part) for part, _ in made.blend]
                content["blend"] = [
                    [part.tokens, share]
                    for part, (_, share) in zip(parts, made.blend, strict=True)
                    if part is not None
                ]
            result[name][split] = {**content, "sources": text.sources(split)}
    progress("tokens", 1.0)
    return result


def _jobs(texts: dict[str, DomainText], directory: Path) -> list[tokenize.TokenizeJob]:
    return [job for name, text in texts.items() for job in tokenize.jobs(text, directory / name)]


def train_pairs(run_dir: Path, domain: str) -> list[Path]:
    """Prefixes of the pairs of a domain's training text.

    Raises:
        UserError: they are missing or incomplete.
    """
    split = tokenized_split(run_dir, domain, "train")
    return [pair for pair, _ in pairs(prefix(run_dir, domain, "train"), split)]


def tokenized_split(run_dir: Path, domain: str, split: str) -> TokenizedSplit:
    """A domain's tokenized text of a run.

    Raises:
        UserError: it is missing or incomplete.
    """
    found = read_tokenized(prefix(run_dir, domain, split))
    if found is None:
        raise UserError(
            f"domains.{domain}",
            f"{prefix(run_dir, domain, split)}.bin and .idx are missing or incomplete",
            "run the prepare stage",
        )
    return found
