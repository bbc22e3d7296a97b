"""SentencePiece models: trained on a recipe's text, or given.

A recipe's own tokenizer is byte-pair encoding with byte fallback, digits apart and no
normalisation at all: what was encoded is decoded again, white space included. Its first pieces are
``<|unknown|>`` (0, never used: bytes stand in), ``<|begin|>`` (1, not used in training) and
``<|end|>`` (2, after every document); there is none for padding. They are not spelt ``<s>`` and
``</s>``, which occur in real text.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_btx.data import word_cache
from megatron_btx.data.tokenizer_base import Tokenizer
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.tokenizer_export import huggingface_files
from megatron_btx.families.tokenizer_libraries import open_slow
from megatron_btx.families.tokenizer_settings import (
    CONFIG,
    FILES,
    TokenizerSettings,
    hashes,
    read_settings,
)

_PLAIN = {
    "LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast",
    "PreTrainedTokenizerFast", "TokenizersBackend",
}  # fmt: skip
"""Classes of ``transformers`` whose ids are those of the SentencePiece model."""
_CONVERT = (
    "write a tokenizer.json, which is read instead: "
    "transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)


class SentencePiece(Tokenizer):
    """A SentencePiece model, and what the files of ``transformers`` beside it say.

    Text never makes a special token, whatever it spells.
    """

    type = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, model: bytes, where: str, beside: Path | None = None) -> None:
        """Read and check it.

        Args:
            model: the bytes of a ``.model`` file.
            where: names it in messages.
            beside: its directory, whose tokenizer_config.json, special_tokens_map.json and
                added_tokens.json count; ``None``: none do.

        Raises:
            UserErrors: it is no SentencePiece model, has no end-of-sentence piece, or the files
                beside it say what SentencePiece does not do.
        """
        self._processor = open_slow(model, where)
        self._words = word_cache.of_sentencepiece(model)
        self._model = model
        self._beside: dict[str, bytes] = {}
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.begin_id = None
        if beside is not None:
            bos, eos = self._settle(read_settings(beside), bos, eos)
        if eos < 0:
            raise UserError(where, "has no end-of-sentence piece", "train it with an `eos_id`")
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), eos

    def _settle(self, settings: TokenizerSettings, bos: int, eos: int) -> tuple[int, int]:
        """Begin and end token by what the files say; refuses what the model does not do."""
        if errors := self._unlike(settings):
            raise UserErrors(errors)
        there = {name: settings.directory / name for name in FILES}
        self._beside = {name: path.read_bytes() for name, path in there.items() if path.exists()}
        self.settings = hashes(settings.directory)
        found = {
            name: self._processor.piece_to_id(token.content)
            for name, token in settings.named.items()
        }
        bos, eos = found.get("bos_token", bos), found.get("eos_token", eos)
        self.begin_id = bos if settings.begins and bos >= 0 else None
        return bos, eos

    def _unlike(self, settings: TokenizerSettings) -> list[UserError]:
        errors = []
        pieces, config = self._processor, settings.config
        for token in settings.tokens:
            at = pieces.piece_to_id(token.content)
            is_own = pieces.id_to_piece(at) == token.content and token.id in (None, at)
            if not is_own or not (pieces.is_control(at) or pieces.is_unknown(at)):
                named = f"{token.content!r}" + (f" ({token.id})" if token.id is not None else "")
                what = f"a token {named} is added, which is no special piece of {self.file}"
                errors.append(UserError(str(settings.directory), what, _CONVERT))
        prefix = settings.flag("add_prefix_space")
        if prefix is not None and prefix != self._puts_a_space():
            what = f"add_prefix_space is {prefix}, and {self.file} was trained with the contrary"
            errors.append(UserError(str(settings.directory / CONFIG), what, _CONVERT))
        for key in ("tokenizer_class", "sp_model_kwargs", "do_lower_case"):
            value = config.get(key)
            if not value or str(value) in _PLAIN:
                continue
            what = f"{key} is {value!r}: another tokenization than that of {self.file} alone"
            errors.append(UserError(str(settings.directory / CONFIG), what, _CONVERT))
        return errors

    def _puts_a_space(self) -> bool:
        """Whether a space goes in front of a text."""
        return str(self._processor.encode("a", out_type=str)[0]).startswith("\u2581")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:  # noqa: D102
        if self._words is not None:
            return self._words.encode(texts)
        rows = self._processor.encode(list(texts), num_threads=_cores())
        return [np.array(row, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:  # noqa: D102
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: str | Path) -> None:  # noqa: D102
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in {self.file: self._model, **self._beside}.items():
            (directory / name).write_bytes(content)
        self._save_info(directory)

    def save_huggingface(self, directory: str | Path) -> None:  # noqa: D102
        directory = Path(directory)
        files = huggingface_files(
            self._model, bos_id=self.bos_id, eos_id=self.eos_id, begin_id=self.begin_id
        )
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, where: str) -> SentencePiece:
    """Train SentencePiece on ``texts``; the same texts give the same bytes.

    Lines are the sentences: no piece holds a line break, which is the byte ``<0x0A>``.

    Raises:
        UserError: there is too little text for ``vocab_size`` pieces, or the size leaves no room
            for the 256 bytes. ``where`` is the recipe's key, for messages.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            unk_piece="<|unknown|>",
            bos_piece="<|begin|>",
            eos_piece="<|end|>",
            unk_surface=" <|unknown|> ",
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            where,
            f"SentencePiece cannot make {vocab_size} pieces of the seed's text "
            f"({str(error).strip().splitlines()[-1]})",
            "choose another vocab_size (at least about 400), or give more text",
        ) from error
    return SentencePiece(model.getvalue(), where)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def _cores() -> int:
    threads = os.environ.get("RAYON_NUM_THREADS", "")  # which `tokenizers` goes by: 0 and what is
    if threads.isdecimal() and int(threads) > 0:  # no number say nothing to it
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
