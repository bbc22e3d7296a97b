"""Whether two tokenizers are one: by what makes token ids of text, not by the bytes of files.

That is vocabulary, merges, normaliser, pre-tokenizer, the model's switches and added tokens.
Post-processor, decoder, truncation, padding, white space of the file and the form of its merges
(pairs, or strings as before ``tokenizers`` 0.20) make no other ids of a text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.families.tokenizer_libraries import no_panic
from megatron_btx.files import read_bytes

FAST, SLOW = "tokenizer.json", "tokenizer.model"
_LIMIT = 1 << 30
_AGAIN = "copy or download the tokenizer's files again"


@dataclass(frozen=True)
class Identity:
    """What a tokenizer makes ids by.

    Args:
        vocabulary: token -> id.
        rest: everything else, by name.
    """

    vocabulary: Mapping[str, int]
    rest: Mapping[str, Any]


def differences(one: Path, other: Path) -> list[str]:
    """In what two tokenizers differ, in words that begin with the second's; nothing: they are one.

    A tokenizer.json and a SentencePiece model are compared by their vocabularies alone.

    Args:
        one: a directory with tokenizer.json, tokenizer.model, or both; or such a file.
        other: likewise.

    Raises:
        UserError: a file is damaged, or a directory holds none of them.
    """
    found = [_files(place) for place in (one, other)]
    for place, files in zip((one, other), found, strict=True):
        if not files:
            what, fix = f"holds no {FAST} and no {SLOW}", "give the directory that has one of them"
            raise UserError(str(place), what, fix)
    common = [name for name in (FAST, SLOW) if all(name in files for files in found)]
    pair = [files[common[0]] if common else next(iter(files.values())) for files in found]
    if common and pair[0].read_bytes() == pair[1].read_bytes():
        return []
    mine, theirs = (identity(path) for path in pair)
    said = _vocabularies(mine.vocabulary, theirs.vocabulary)
    for name in mine.rest if common else ():
        said += _parts(name, mine.rest[name], theirs.rest.get(name))
    return said


def most_tokens(places: Mapping[str, Path]) -> str:
    """Whose tokenizer.json has the most tokens; the first of several."""
    return max(places, key=lambda label: len(identity(places[label] / FAST).vocabulary))


def beyond_added(one: Path, more: Path) -> list[str]:
    """In what a second tokenizer is not a first with more added tokens; nothing: it is.

    Args:
        one: a directory with tokenizer.json.
        more: likewise.

    Raises:
        UserError: a file is damaged.
    """
    mine, theirs = (identity(place / FAST) for place in (one, more))
    added, known = theirs.rest["added tokens"], set(mine.vocabulary.values())
    new = {
        token
        for token, at in theirs.vocabulary.items()
        if token in added and token not in mine.vocabulary and at not in known
    }
    kept = {token: at for token, at in theirs.vocabulary.items() if token not in new}
    rest = {**theirs.rest, "added tokens": {t: added[t] for t in added if t not in new}}
    said = _vocabularies(mine.vocabulary, kept)
    for name in mine.rest:
        said += _parts(name, mine.rest[name], rest[name])
    return said


def differ_in_added_tokens(one: Path, other: Path) -> bool:
    """Whether one tokenizer is the other with more added tokens, as their tokenizer.json say."""
    places = {str(place): place for place in (one, other)}
    if len(places) < 2 or not all((place / FAST).is_file() for place in places.values()):
        return False
    most = places.pop(most_tokens(places))
    return not any(beyond_added(fewer, most) for fewer in places.values())


def _files(place: Path) -> dict[str, Path]:
    if place.is_file():
        return {FAST if place.suffix == ".json" else SLOW: place}
    return {name: place / name for name in (FAST, SLOW) if (place / name).is_file()}


def identity(path: Path) -> Identity:
    """Of a tokenizer.json or tokenizer.model.

    Raises:
        UserError: it is damaged.
    """
    content = read_bytes(path, _LIMIT)
    try:
        return _fast(content) if path.suffix == ".json" else _slow(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(str(path), f"is damaged: {error!r}"[:300], _AGAIN) from error


def _fast(content: bytes) -> Identity:
    raw = json.loads(_canonical(content.decode("utf-8")))
    model = dict(raw["model"])
    vocab, merges = model.pop("vocab"), model.pop("merges", [])
    if not isinstance(vocab, dict):  # Unigram: pieces and scores
        model["scores"] = [score for _, score in vocab]
        vocab = {piece: at for at, (piece, _) in enumerate(vocab)}
    added = {token["content"]: token for token in raw.get("added_tokens") or ()}
    return Identity(
        vocab | {content: token["id"] for content, token in added.items()},
        {
            "merges": [m.split(" ") if isinstance(m, str) else m for m in merges],
            "model": {key: value for key, value in model.items() if value},
            "normalizer": raw.get("normalizer"),
            "pre_tokenizer": _without_offsets(raw.get("pre_tokenizer")),
            "added tokens": added,
        },
    )


def _canonical(text: str) -> str:
    """The file as the library would write it: defaults filled in, merges as pairs."""
    try:
        import tokenizers
    except ImportError:
        return text
    with no_panic("tokenizer.json"):
        return tokenizers.Tokenizer.from_str(text).to_str()


def _without_offsets(part: Any) -> Any:
    """``trim_offsets`` moves where a token is said to stand, and no id."""
    if isinstance(part, dict):
        return {k: _without_offsets(v) for k, v in part.items() if k != "trim_offsets"}
    return [_without_offsets(each) for each in part] if isinstance(part, list) else part


def _slow(content: bytes) -> Identity:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as schema

    try:
        proto = schema.ModelProto.FromString(content)  # type: ignore[attr-defined]
    except DecodeError as error:
        raise ValueError(str(error)) from error
    trainer = proto.trainer_spec
    names = ("model_type", "byte_fallback", "treat_whitespace_as_suffix")
    return Identity(
        {piece.piece: at for at, piece in enumerate(proto.pieces)},
        {
            "scores": [piece.score for piece in proto.pieces],
            "kinds of pieces": [piece.type for piece in proto.pieces],
            "model": {name: getattr(trainer, name) for name in names},
            "normalizer": proto.normalizer_spec.SerializeToString(deterministic=True).hex(),
        },
    )


def _vocabularies(mine: Mapping[str, int], theirs: Mapping[str, int]) -> list[str]:
    unlike = [token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)]
    if not unlike:
        return []
    far = 1 << 60
    ids = {token: (mine.get(token, far), theirs.get(token, far)) for token in unlike}
    first = min(unlike, key=lambda token: (min(ids[token]), ids[token]))
    said = ["absent" if at == far else str(at) for at in reversed(ids[first])]
    return [f"vocabulary: {first!r} is {said[0]}, not {said[1]} ({len(unlike):,} tokens differ)"]


def _parts(name: str, mine: Any, theirs: Any) -> list[str]:
    if mine == theirs:
        return []
    if isinstance(mine, list) and isinstance(theirs, list):
        pairs = zip(mine, theirs, strict=False)
        at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(theirs)))
        return [f"{name}: from number {at} on ({len(theirs):,}, not {len(mine):,})"]
    if name == "added tokens":
        unlike = [token for token in {**theirs, **mine} if mine.get(token) != theirs.get(token)]
        return [f"{name}: {', '.join(map(repr, unlike[:3]))} ({len(unlike)} differ)"]
    return [f"{name}: {_short(theirs)}, not {_short(mine)}"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
