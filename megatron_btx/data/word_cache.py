"""Tokenization with a cache of words: a word that was encoded before is not encoded again.

Both libraries merge only what lies together in one word, so a text can be cut where no token of any
text crosses, and its words can be encoded each by itself. Where that cannot be shown of a tokenizer
from its own description, there is no cache: :func:`of_sentencepiece` and :func:`of_fast` return
``None``, and the library encodes whole texts.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SPACE = "\u2581"
_LIMIT = 1 << 22
"""Characters of cached words; above this the cache is emptied. About 70 MB in each process."""


class WordCache:
    """The ids of the words of one tokenizer."""

    def __init__(
        self,
        encode: Callable[[list[str]], Iterable[Sequence[int]]],
        cut: re.Pattern[str],
        prefix: str = "",
    ) -> None:
        """``encode`` gives the ids of words, ``cut`` finds a text's words (joined they are the
        text), ``prefix`` goes in front of every text."""
        self._encode, self._cut, self._prefix = encode, cut, prefix
        self._ids: dict[str, bytes] = {}
        self._characters = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without its words: another process makes its own."""
        return self.__dict__ | {"_ids": {}, "_characters": 0}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n]."""
        rows = [self._cut.findall(self._prefix + text) if text else [] for text in texts]
        if self._characters > _LIMIT:
            self._ids.clear()
            self._characters = 0
        new = list(set().union(*rows).difference(self._ids))
        self._characters += sum(map(len, new))
        encoded = self._encode(new)
        self._ids.update(
            (word, array("i", ids).tobytes()) for word, ids in zip(new, encoded, strict=True)
        )
        return [
            np.frombuffer(bytearray().join(map(self._ids.__getitem__, row)), np.int32)
            for row in rows
        ]


# SentencePiece

_CUTS = (
    rf"\n|[ {_SPACE}]*(?:[^\W\d_]+|\d+|(?:[^\w {_SPACE}\n]|_)+)|[ {_SPACE}]+",
    rf"\n|[ {_SPACE}]*[^ {_SPACE}\n]+|[ {_SPACE}]+",
    rf"[ {_SPACE}]*[^ {_SPACE}]+|[ {_SPACE}]+",
)
"""Ways to find words, the shortest words first: runs of letters, of digits and of other characters,
each with the spaces before it; what lies between spaces and line breaks; between spaces. Whether
two neighbours are parted depends on these two characters alone. A text may spell the space's sign,
which is then a space."""


def of_sentencepiece(model: bytes) -> WordCache | None:
    """Of the bytes of a ``.model``.

    Byte-pair encoding merges neighbours only into pieces of the vocabulary: if no piece holds two
    neighbours that are parted, nothing is ever merged across.

    ``None`` where words cannot be encoded each by itself (a unigram model adds up scores over the
    whole text, a normalizer may look beyond a word), or where protobuf, which reads such models, is
    not installed.
    """
    import sentencepiece

    try:
        from sentencepiece import sentencepiece_model_pb2 as schema
    except ImportError:
        return None
    proto = schema.ModelProto.FromString(model)  # type: ignore[attr-defined]  # made at run time
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    by_word = (
        trainer.model_type == trainer.BPE
        and trainer.byte_fallback  # else unknown characters that are neighbours become one token
        and not trainer.treat_whitespace_as_suffix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
    )
    kinds = schema.ModelProto.SentencePiece  # type: ignore[attr-defined]
    never = (kinds.CONTROL, kinds.UNKNOWN, kinds.BYTE)  # no text is merged into one of these
    pieces = [piece.piece for piece in proto.pieces if piece.type not in never]
    cuts = (re.compile(cut) for cut in _CUTS)
    fits = (cut for cut in cuts if all(len(cut.findall(piece)) == 1 for piece in pieces))
    cut = next(fits, None)
    if not by_word or cut is None:
        return None
    prefix = " " if normalizer.add_dummy_prefix else ""
    normalizer.add_dummy_prefix = False  # a text's, not a word's
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return WordCache(functools.partial(processor.encode, num_threads=1), cut, prefix)


# tokenizers

_ATTACHED, _APART = r"[\r\n]*+", ""
"""Line breaks right after punctuation are in its token, or never are."""
_SPLITS = {
    # Llama 3, and with single digits Qwen2 to Qwen3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": _ATTACHED,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": _ATTACHED,
    # GPT-2's, which ByteLevel has built in
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": _APART,
}
"""Patterns by which texts are split before byte-pair encoding, and what becomes of line breaks."""


def of_fast(tokenizer: Tokenizer) -> FastCache | None:
    """Of a ``tokenizer.json`` that splits text by one of the known patterns.

    Of ASCII characters each pattern parts: a letter from what is none; a digit from what is none;
    punctuation from a digit, and from white space after it (for line breaks see above). From such
    a place on a match depends only on the text that follows, and no match that began before it
    reaches beyond it, so words that end there are split by themselves as they are within the text.
    Other characters part nothing: a word goes on with them.

    ``None`` for any other pattern, normalizer or model.
    """
    state = _state(tokenizer.normalizer)
    breaks = _line_breaks(_state(tokenizer.pre_tokenizer))
    plain = state is None or state == {"type": "NFC"}
    model = tokenizer.model
    is_bpe = type(model).__name__ == "BPE" and not model.dropout
    if not plain or breaks is None or not is_bpe:
        return None
    return FastCache(tokenizer, breaks, composes=state is not None)


class FastCache(WordCache):
    """Texts that spell an added token, which is found before anything is split, are left to the
    library."""

    def __init__(self, tokenizer: Tokenizer, breaks: str, *, composes: bool) -> None:
        """``composes``: the tokenizer brings text into Unicode's composed form (NFC)."""
        encode = functools.partial(_encode, tokenizer)
        space, mark = r"[ \t\r\n]", r"[!-/:-@\[-`{-~]"
        core = rf"(?:{mark}++(?:[A-Za-z]++|{breaks})|[A-Za-z]++|[0-9]++)?+"
        word = rf"{space}*+{core}"
        super().__init__(encode, re.compile(rf"{word}(?:[^\t\r\n -~]++{word})*+"))
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._whole, self._composes = encode, composes

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n]."""
        found = super().encode([text if self._is_plain(text) else "" for text in texts])
        others = [number for number, text in enumerate(texts) if text and not len(found[number])]
        rows = self._whole([texts[number] for number in others])
        for number, ids in zip(others, rows, strict=True):
            found[number] = np.array(ids, np.int32)
        return found

    def _is_plain(self, text: str) -> bool:
        if self._added is not None and self._added.search(text):
            return False
        return not self._composes or unicodedata.is_normalized("NFC", text)


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    rows = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [row.ids for row in rows]


def _line_breaks(state: Any) -> str | None:
    """What the pre-tokenizer of this state does with line breaks after punctuation; ``None``: it is
    another one."""
    if state is None:
        return None
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    if steps and steps[0]["type"] == "Digits":
        steps = steps[1:]
    *split, level = steps or [{"type": ""}]
    if level["type"] != "ByteLevel" or level["add_prefix_space"]:
        return None
    if not split:
        return _APART if level["use_regex"] else None
    (first, *more) = split
    isolated = first["type"] == "Split" and first["behavior"] == "Isolated" and not first["invert"]
    if more or not isolated or level["use_regex"]:
        return None
    return _SPLITS.get(first["pattern"].get("Regex", ""))


def _state(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())
