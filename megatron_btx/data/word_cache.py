"""SentencePiece's ids of a text, word by word: a word that has come before is not encoded again.

That is exact where no piece reaches over the place at which a text is cut. Byte-pair encoding
merges neighbours only into pieces of the vocabulary: where none of them has ``U+2581`` (the space)
behind another character, nothing is ever merged over the beginning of a run of spaces, and where
none has a line break, nothing over either side of one. Imports no torch.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

_SPACE = "\u2581"
_MOST = 1 << 22
"""Characters of words that are kept, until all are forgotten: some 70 MB in each process."""


class WordCache:
    """The ids of the words of one model."""

    def __init__(
        self, processor: sentencepiece.SentencePieceProcessor, cut: re.Pattern[str], prefix: str
    ) -> None:
        """``cut`` finds a text's words, ``prefix`` goes in front of every text."""
        self._processor, self._cut, self._prefix = processor, cut, prefix
        self._ids: dict[str, bytes] = {}
        self._characters = 0

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n]."""
        rows = [self._cut.findall(self._prefix + text) if text else [] for text in texts]
        if self._characters > _MOST:
            self._ids.clear()
            self._characters = 0
        new = list(set().union(*rows).difference(self._ids))
        self._characters += sum(map(len, new))
        encoded = self._processor.encode(new, num_threads=1)
        self._ids.update(
            (w, array("i", ids).tobytes()) for w, ids in zip(new, encoded, strict=True)
        )
        return [
            np.frombuffer(bytearray().join(map(self._ids.__getitem__, row)), np.int32)
            for row in rows
        ]


def word_cache(model: bytes) -> WordCache | None:
    """Of the bytes of a ``.model``.

    ``None`` where words cannot be encoded each by itself (a unigram model adds up scores over the
    whole text, a normalizer may look beyond a word), or where protobuf, which reads such models, is
    not installed.
    """
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
        and not any(_SPACE in piece.piece.lstrip(_SPACE) for piece in proto.pieces)
    )
    if not by_word:
        return None
    prefix = " " if normalizer.add_dummy_prefix else ""
    normalizer.add_dummy_prefix = False  # a text's, not a word's
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return WordCache(processor, _cut(piece.piece for piece in proto.pieces), prefix)


def _cut(pieces: Iterable[str]) -> re.Pattern[str]:
    """A text may spell the space's sign, which is then one."""
    if any("\n" in piece for piece in pieces):
        return re.compile(f"[ {_SPACE}]*[^ {_SPACE}]+|[ {_SPACE}]+")
    return re.compile(f"\n|[ {_SPACE}]*[^ {_SPACE}\n]+|[ {_SPACE}]+")
