"""Tokenizers: SentencePiece (trained here or given), or a Hugging Face ``tokenizer.json``. Imports
no torch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from megatron_btx.data.tokenizer_base import INFO, Tokenizer
from megatron_btx.data.tokenizer_huggingface import HuggingFace
from megatron_btx.data.tokenizer_sentencepiece import SentencePiece, train_tokenizer
from megatron_btx.errors import UserError, errors_of
from megatron_btx.families.tokenizer_files import place_of
from megatron_btx.families.tokenizer_settings import CONFIG
from megatron_btx.files import read_bytes, read_json
from megatron_btx.weights.find_checkpoint import foreign

__all__ = [
    "INFO", "HuggingFace", "SentencePiece", "Tokenizer", "check_vocabulary", "given_tokenizer",
    "load_tokenizer", "read_tokenizer", "tokenizer_of", "train_tokenizer",
]  # fmt: skip

_FILES: dict[str, str] = {kind.type: kind.file for kind in (SentencePiece, HuggingFace)}
_GIVE = "give a `.model` file, a tokenizer.json, or a directory with one of them"
_LIMIT = 1 << 30
"""Bytes of a SentencePiece model; the largest known have 5 million."""


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote to ``directory``.

    Raises:
        UserError: there is none, or its file is not the one that was written.
    """
    directory = Path(directory)
    path, again = directory / INFO, "run the prepare stage again, or copy the checkpoint again"
    if not path.exists():
        raise UserError(str(directory), "holds no tokenizer", "run the prepare stage")
    info = read_json(path)
    kind = info.get("type")
    if not isinstance(kind, str) or _FILES.get(kind) is None or info.get("file") != _FILES[kind]:
        raise UserError(str(path), "is damaged: it names no tokenizer", again)
    tokenizer = read_tokenizer(directory / _FILES[kind], kind)
    if tokenizer.sha256 != info.get("sha256"):
        raise UserError(
            str(directory / _FILES[kind]),
            f"has changed: its sha256 is not the one in {INFO}",
            "restore it; models are trained with exactly one tokenizer",
        )
    if info.get("begin_token_id", tokenizer.begin_id) != tokenizer.begin_id:
        said = info["begin_token_id"]
        what = f"puts {tokenizer.begin_id} before a text, not {said} as {INFO} says"
        raise UserError(str(directory), what, "restore the files beside the tokenizer")
    return tokenizer


def read_tokenizer(path: str | Path, type_: str, *, where: str | None = None) -> Tokenizer:
    """A user's tokenizer: a SentencePiece ``.model``, a ``tokenizer.json``, or a directory of one.

    Args:
        path: file or directory.
        type_: ``sentencepiece`` or ``huggingface``, for a directory that has both; if it has only
            one, that one is read.
        where: the recipe's key, which errors then name before the file.

    Raises:
        UserErrors: it is missing or unusable.
    """
    with nullcontext() if where is None else errors_of(where):
        return _read(Path(path), type_)


def _read(path: Path, type_: str) -> Tokenizer:
    if not path.exists():
        hub = foreign(path)
        raise UserError(str(path), "does not exist", hub.fix if hub else "correct the path")
    if _kind(path, type_) == HuggingFace.type:
        if path.is_file() and path.name not in (HuggingFace.file, CONFIG):
            raise UserError(str(path), f"is no {HuggingFace.file}", _GIVE)
        return HuggingFace(path if path.is_dir() else path.parent)
    if path.is_dir():
        path = path / SentencePiece.file
        if not path.is_file():
            raise UserError(str(path), f"does not exist, nor does {HuggingFace.file}", _GIVE)
    beside = path.parent if path.name == SentencePiece.file else None
    return SentencePiece(read_bytes(path, _LIMIT), str(path), beside)


def _kind(path: Path, type_: str) -> str:
    """The type of what is at ``path``, whatever the recipe says."""
    if path.is_file():
        kinds = {".json": HuggingFace.type, ".model": SentencePiece.type}
        return kinds.get(path.suffix, type_)
    there = [kind for kind, name in _FILES.items() if (path / name).is_file()]
    return there[0] if len(there) == 1 else type_


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, where: str) -> None:
    """Check that a model of ``vocab_size`` has a row for each token.

    Raises:
        UserError: the tokenizer is larger.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            where,
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}",
            "take the tokenizer that the model was trained with",
        )


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint, or in its run's ``prepare/``.

    Raises:
        UserError: there is none.
    """
    run_dir = path.absolute().parent.parent.parent
    for place in (path / "tokenizer", path, run_dir / "prepare" / "tokenizer"):
        if (place / INFO).is_file():
            return load_tokenizer(place)
    for kind, name in (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        if (place_of(path) / name).is_file():
            return read_tokenizer(place_of(path), kind)
    raise UserError(str(path), "comes without a tokenizer", "give its directory as --tokenizer")


def given_tokenizer(path: Path) -> Tokenizer:
    """A user's ``--tokenizer``: a directory or a file."""
    if path.is_dir():
        return tokenizer_of(path)
    return read_tokenizer(path, "sentencepiece" if path.suffix == ".model" else "huggingface")
