"""The tokenizer of a run: the one that its recipe names, its seed's, or one trained on its text.
Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.data import Progress
from megatron_btx.data.documents import find_files
from megatron_btx.data.domain_text import DomainText, digest, document_hash
from megatron_btx.data.formats import format_of, token_pair
from megatron_btx.data.tokenizer import (
    INFO,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from megatron_btx.errors import UserError, collect_errors
from megatron_btx.families.tokenizer_files import describe_tokenizer, place_of
from megatron_btx.families.tokenizer_identity import differences, most_tokens
from megatron_btx.files import find_json, unfinished, write_json
from megatron_btx.recipe.schema import Recipe, TokenizerBlock
from megatron_btx.recipe.stages import taken
from megatron_btx.weights.find_checkpoint import find_checkpoint


def check_trainable(recipe: Recipe) -> None:
    """Check that a tokenizer that has to be trained has text to be trained on.

    Raises:
        UserError: the training data are token ids.
    """
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


def make_tokenizer(
    recipe: Recipe, texts: dict[str, DomainText], directory: Path, progress: Progress
) -> Tokenizer:
    """The tokenizer that the recipe names, its seed's, or one trained on its text.

    It is stored in ``directory`` and reused while its inputs are the same.

    Raises:
        UserError: it is missing, damaged, or not the seed's.
    """
    wanted, seed = recipe.tokenizer, _speaker(recipe)
    given: Tokenizer | None = None
    if wanted.path is not None:
        given = read_tokenizer(wanted.path, wanted.type, where="tokenizer.path")
    if seed is not None:
        given = _seeds_tokenizer(seed, given, wanted.path)
    if given is not None:
        key = given.identity
    else:
        readers = {name: texts[name] for name in recipe.seed.data or texts}
        key = digest([wanted.vocab_size, wanted.train_bytes, sorted(readers),
                       [readers[name].key("train") for name in sorted(readers)]])  # fmt: skip
    if (find_json(directory / "made.json") or {}).get("key") == key:
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
        with collect_errors(errors):  # SentencePiece replaces any exception by its own
            yield from _sample(texts, wanted.train_bytes)

    try:
        return train_tokenizer(documents(), wanted.vocab_size, where="tokenizer.vocab_size")
    finally:
        if errors:
            raise errors[0]


def _speaker(recipe: Recipe) -> Path | None:
    """The model whose tokenizer the run gets: the seed, or that of the most tokens."""
    if not recipe.mix.align_vocab:
        return None if recipe.seed.from_ is None else Path(recipe.seed.from_)
    models = taken(recipe)
    places = {name: place_of(find_checkpoint(Path(path))) for name, path in models.items()}
    return Path(models[most_tokens(places)])


def _seeds_tokenizer(seed: Path, given: Tokenizer | None, path: str | None) -> Tokenizer:
    """The tokenizer beside the seed's weights (a Megatron checkpoint or a Hugging Face directory),
    or the one given at ``path`` if it is the same."""
    checkpoint = find_checkpoint(seed)
    theirs = None
    place = place_of(checkpoint)
    if (place / INFO).is_file():
        theirs = load_tokenizer(place)
    elif (place / HuggingFace.file).is_file():
        theirs = read_tokenizer(place, HuggingFace.type, where="seed.from")
    elif (place / SentencePiece.file).is_file():
        theirs = read_tokenizer(place, SentencePiece.type, where="seed.from")
    tokenizer = given or theirs
    if tokenizer is None:
        raise UserError(
            "seed.from",
            f"{checkpoint} comes without its tokenizer",
            "give the tokenizer it was trained with as tokenizer.path",
        )
    if theirs and path and (unlike := unlike_given(checkpoint, Path(path))):
        raise UserError(
            "tokenizer.path",
            f"is not the tokenizer that the seed was trained with (seed.from): {unlike}",
            DROP,
        )
    manifest = (
        find_json(checkpoint / "manifest.json") or find_json(checkpoint / "config.json") or {}
    )
    size = manifest.get("vocab_size")
    if size is not None:
        check_vocabulary(tokenizer, size, where="tokenizer.path")
    return tokenizer


DROP = "remove tokenizer.path: then the seed's own tokenizer is used"


def unlike_given(checkpoint: Path, path: Path) -> str:
    """In what the tokenizer at ``path`` is not that of a checkpoint; empty where it is, or where
    the checkpoint comes without.

    Raises:
        UserError: at ``path`` is none.
    """
    place = place_of(checkpoint)
    return "; ".join(differences(place, path)) if describe_tokenizer(place) is not None else ""


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
