"""What the JSON files beside a tokenizer say: which tokens are special, which were added, what is
put before a text. Read by the rules of ``transformers`` (``PreTrainedTokenizerBase``)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import read_json

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (CONFIG, MAP, ADDED)

_MODELS = ("tokenizer.json", "tokenizer.model")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = {"lstrip", "rstrip", "single_word", "normalized", "special"}


@dataclass(frozen=True)
class Token:
    """A token that the files name.

    Args:
        content: its text.
        id: where they give it; ``None``: it is the vocabulary's.
        flags: those of ``tokenizers.AddedToken`` that they give.
    """

    content: str
    id: int | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerSettings:
    """The files' content.

    Args:
        directory: where they are.
        named: ``eos_token`` and the like -> the token.
        extra: further special tokens.
        added: tokens outside the model's own vocabulary, by id.
        config: ``tokenizer_config.json``, for the rest.
    """

    directory: Path
    named: Mapping[str, Token]
    extra: tuple[Token, ...]
    added: tuple[Token, ...]
    config: Mapping[str, Any]

    def flag(self, name: str) -> bool | None:
        """A switch of ``tokenizer_config.json``; ``None`` where it says nothing."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, bool):
            raise _wrong(self.directory / CONFIG, name, value, "true or false")
        return value

    @property
    def begins(self) -> bool:
        """Whether a SentencePiece model puts its begin token before a text: by the flag, else as
        its class does where there is none."""
        flag = self.flag("add_bos_token")
        of_class = str(self.config.get("tokenizer_class")).startswith("CodeLlamaTokenizer")
        return of_class if flag is None else flag

    @property
    def tokens(self) -> tuple[Token, ...]:
        """All tokens that the files name."""
        return (*self.added, *self.named.values(), *self.extra)


def files_beside(path: Path) -> list[Path]:
    """The files that count beside a tokenizer that is given by one of its files."""
    if path.name not in (*_MODELS, CONFIG):
        return []
    # tokenizer_config.json may stand for the directory: its tokenizer.json is read then.
    names = ["tokenizer.json", *FILES[1:]] if path.name == CONFIG else FILES
    return [path.parent / name for name in names if (path.parent / name).is_file()]


def hashes(directory: Path) -> dict[str, str]:
    """Name -> sha256 of the files in a directory that :func:`read_settings` reads."""
    there = [name for name in FILES if (directory / name).is_file()]
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in there}


def read_settings(directory: Path) -> TokenizerSettings:
    """What the files in a directory say; nothing where there are none.

    ``special_tokens_map.json`` and ``added_tokens.json`` count, and the first above
    ``tokenizer_config.json``, unless this has an ``added_tokens_decoder``.

    Raises:
        UserError: a file is damaged, or a value has another type than it must have.
    """
    config, mapped, added = (_read(directory / name) for name in FILES)
    decoder = config.get("added_tokens_decoder")
    at = directory / CONFIG
    if decoder is not None:
        if not isinstance(decoder, dict):
            raise _wrong(at, "added_tokens_decoder", decoder, "an object")
        tokens = [_token(at, "added_tokens_decoder", t, _id(at, i)) for i, t in decoder.items()]
        said, place = config, at
    else:
        where = directory / ADDED
        tokens = [_token(where, content, content, _id(where, i)) for content, i in added.items()]
        said, place = {**config, **mapped}, directory / MAP
    named = {
        key: _token(place, key, value)
        for key, value in said.items()
        if key.endswith("_token") and value is not None and not isinstance(value, bool)
    }
    extra = [each for key in _EXTRA for each in _several(place, key, said.get(key))]
    return TokenizerSettings(directory, named, tuple(extra), tuple(tokens), config)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _several(where: Path, key: str, value: Any) -> list[Token]:
    """A list of tokens; in an object (transformers 5) they have names, which do not matter."""
    if value is None:
        return []
    if not isinstance(value, (list, dict)):
        raise _wrong(where, key, value, "a list of tokens")
    return [
        _token(where, key, each) for each in (value.values() if isinstance(value, dict) else value)
    ]


def _token(where: Path, key: str, value: Any, id_: int | None = None) -> Token:
    """A token as text or as an object with its text and flags."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise _wrong(where, key, value, "a token: its text, or an object with `content`")
    flags = {k: v for k, v in value.items() if k in _FLAGS} if isinstance(value, dict) else {}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(where, key, value, "a token whose flags are true or false")
    return Token(content, id_, flags)


def _id(where: Path, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, (str, int)) and value is not True else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << 31:
        raise _wrong(where, "a token's id", value, "a number from 0 on")
    return number


def _wrong(where: Path, key: str, value: Any, must: str) -> UserError:
    shown = repr(value)[:80]
    return UserError(str(where), f"{key} is {shown}, not {must}", "copy the model's own file")
