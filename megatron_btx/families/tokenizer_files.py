"""A tokenizer's files beside weights: found, described, carried along."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from megatron_btx.errors import UserError
from megatron_btx.families.tokenizer_export import huggingface_files
from megatron_btx.families.tokenizer_identity import FAST, SLOW
from megatron_btx.families.tokenizer_libraries import begin_token, open_fast, open_slow
from megatron_btx.families.tokenizer_settings import CONFIG, FILES, read_settings
from megatron_btx.files import find_json, read_bytes

_DEFINING = (("huggingface", FAST), ("sentencepiece", SLOW))
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_OTHERS = (
    CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    *_TEMPLATES, "generation_config.json",
)  # fmt: skip
_MORE_TEMPLATES = "additional_chat_templates/*.jinja"
_INFO = "tokenizer_info.json"
_LIMIT = 1 << 30
"""Bytes of a tokenizer's file."""


def place_of(directory: Path) -> Path:
    """Where the tokenizer's files of a checkpoint are: of ours in ``tokenizer/``, of a Hugging Face
    directory beside the weights, of Megatron-LM's where its arguments say, if that is here."""
    own = directory / "tokenizer"
    if own.is_dir():
        return own
    if any((directory / name).exists() for name in ("config.json", "manifest.json")):
        return directory
    from megatron_btx.weights.megatron_lm_args import tokenizer_named  # imports torch

    return tokenizer_named(directory) or directory


def vocabulary_size(tokenizer: Path) -> int | None:
    """How many ids a tokenizer has, by the largest; ``None`` where there is none.

    Args:
        tokenizer: its directory, or its file.

    Raises:
        UserErrors: its files are damaged or contradict each other.
    """
    place = tokenizer.parent if tokenizer.is_file() else tokenizer
    slow = tokenizer.suffix == ".model" and tokenizer.is_file()
    if not slow and (place / FAST).is_file():
        found = open_fast(place / FAST, read_settings(place))
        return max(found.get_vocab(with_added_tokens=True).values()) + 1
    path = tokenizer if slow else place / SLOW
    if not path.is_file():
        return None
    return open_slow(read_bytes(path, _LIMIT), str(path)).vocab_size()


def describe_tokenizer(directory: Path) -> dict[str, Any] | None:
    """``{"type", "file", "sha256"}`` of the tokenizer in a directory, as manifests say it; ``None``
    where there is none."""
    for kind, name in _DEFINING:
        path = directory / name
        if path.is_file():
            digest = hashlib.sha256(read_bytes(path, _LIMIT)).hexdigest()
            return {"type": kind, "file": name, "sha256": digest}
    return None


def described_whole(directory: Path) -> dict[str, Any] | None:
    """:func:`describe_tokenizer` with ``begin_token_id``, where the tokenizer puts such a token
    before a text. It is asked; without the ``tokenizers`` library nothing is said.

    Raises:
        UserErrors: its files are damaged or contradict each other.
    """
    found = describe_tokenizer(directory)
    if found is None:
        return None
    begin = _begin(directory, found["type"])
    return found if begin is None else {**found, "begin_token_id": begin}


def _begin(directory: Path, kind: str) -> int | None:
    settings = read_settings(directory)
    if kind == "huggingface":
        try:
            import tokenizers  # noqa: F401
        except ImportError:
            return None
        path = directory / FAST
        return begin_token(open_fast(path, settings), str(path))
    if not settings.begins:
        return None
    pieces = _open_slow(directory)
    bos = settings.named.get("bos_token")
    at = pieces.bos_id() if bos is None else pieces.piece_to_id(bos.content)
    return at if at >= 0 else None


def has_chat_template(directory: Path) -> bool:
    """Whether a checkpoint's tokenizer comes with one."""
    place = place_of(directory)
    if any((place / name).is_file() for name in _TEMPLATES):
        return True
    try:
        return bool(read_settings(place).config.get("chat_template"))
    except UserError:
        return False  # what is damaged is told by who reads the tokenizer


def tokenizer_files(directory: Path, *, megatron: bool) -> dict[str, bytes]:
    """The tokenizer of a checkpoint of either format, for a result of either format.

    A SentencePiece model that was trained here has none of the files that ``transformers`` needs:
    they are written. Everything else is carried along as it is.

    Args:
        directory: a Hugging Face directory or a step directory of ours.
        megatron: whether the result is a step directory.

    Returns:
        Contents by path within the result; empty where the checkpoint has no tokenizer.

    Raises:
        UserErrors: the files are damaged, or the model cannot be written for ``transformers``.
    """
    place = place_of(directory)
    names = [name for _, name in _DEFINING] + list(_OTHERS)
    names += [str(path.relative_to(place)) for path in sorted(place.glob(_MORE_TEMPLATES))]
    found = {n: read_bytes(place / n, _LIMIT) for n in names if (place / n).is_file()}
    if not megatron:
        return found | (_exported(found[SLOW]) if _is_trained_here(directory) else {})
    described = described_whole(place)
    if described is None:
        return found
    found[_INFO] = (json.dumps(described, indent=1) + "\n").encode()
    return {f"tokenizer/{name}": content for name, content in found.items()}


def token_ids(directory: Path) -> dict[str, int]:
    """``bos_token_id`` and ``eos_token_id`` that a Megatron checkpoint's tokenizer names, for the
    ``config.json`` of one that came from none, or kept nothing of it: ours that were trained here,
    Megatron-Bridge's.

    Raises:
        UserErrors: the tokenizer's files are damaged or contradict each other.
    """
    if (directory / "config.json").is_file() or _huggingface_of(directory):
        return {}
    place = place_of(directory)
    if _is_trained_here(directory):
        pieces = _open_slow(place)
        ids = {"bos_token_id": pieces.bos_id(), "eos_token_id": pieces.eos_id()}
        return {name: each for name, each in ids.items() if each >= 0}
    described = describe_tokenizer(place)
    return {} if described is None else _named_ids(place, described["type"])


def _named_ids(place: Path, kind: str) -> dict[str, int]:
    """Ids of the tokens that the files beside a tokenizer name."""
    settings = read_settings(place)
    keys = ("bos_token", "eos_token")
    named = {f"{key}_id": settings.named[key].content for key in keys if key in settings.named}
    if kind == "huggingface":
        tokenizer = open_fast(place / FAST, settings) if named else None
        found = {key: tokenizer.token_to_id(token) for key, token in named.items() if tokenizer}
    else:
        pieces = _open_slow(place)
        found = {key: pieces.piece_to_id(token) for key, token in named.items()}
    return {key: id_ for key, id_ in found.items() if id_ is not None and id_ >= 0}


def _is_trained_here(directory: Path) -> bool:
    """Whether the tokenizer is a SentencePiece model alone, which came from no other directory."""
    place = place_of(directory)
    slow = (place / _INFO).is_file() and (place / SLOW).is_file()
    if not slow or any((place / name).exists() for name in (FAST, *FILES)):
        return False
    return not _huggingface_of(directory)


def _huggingface_of(directory: Path) -> Any:
    """What a manifest of ours kept of the ``config.json`` that its model came with."""
    return (find_json(directory / "manifest.json") or {}).get("huggingface")


def _exported(model: bytes) -> dict[str, bytes]:
    pieces = open_slow(model, SLOW)
    bos = pieces.bos_id() if pieces.bos_id() >= 0 else None
    return huggingface_files(model, bos_id=bos, eos_id=pieces.eos_id(), begin_id=None)


def _open_slow(place: Path) -> SentencePieceProcessor:
    return open_slow(read_bytes(place / SLOW, _LIMIT), str(place / SLOW))
