"""Tokenizers: SentencePiece (trained here or given), or a Hugging Face ``tokenizer.json``.

A recipe's own tokenizer is byte-pair encoding with byte fallback, digits apart and no
normalisation at all: what was encoded is decoded again, white space included. Its first pieces are
``<|unknown|>`` (0, never used: bytes stand in), ``<|begin|>`` (1, not used in training) and
``<|end|>`` (2, after every document); there is none for padding. They are not spelt ``<s>`` and
``</s>``, which occur in real text, where Hugging Face's tokenizers take them for the special
tokens. Imports no torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from megatron_btx.data.tokenizer_export import write_huggingface
from megatron_btx.errors import UserError
from megatron_btx.files import write_json

INFO = "tokenizer_info.json"
"""Beside the tokenizer's own file: ``{"type", "file", "sha256"}``."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    type: Literal["sentencepiece", "huggingface"]
    file: str
    """Name of the file that defines it."""
    sha256: str
    """Of that file's bytes."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int
    """Ends every document."""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n]; no special token is added. Uses all cores."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``."""

    @abstractmethod
    def save(self, directory: str | Path) -> None:
        """Write it to ``directory``, for :func:`load_tokenizer`."""

    @abstractmethod
    def save_huggingface(self, directory: str | Path) -> None:
        """Write what ``transformers.AutoTokenizer`` needs to give the same ids.

        Raises:
            UserError: this tokenizer cannot be expressed exactly.
        """

    def describe(self) -> dict[str, Any]:
        """What a manifest holds of it."""
        return {"type": self.type, "file": self.file, "sha256": self.sha256}

    def _save_info(self, directory: Path) -> None:
        write_json(directory / INFO, self.describe())


class SentencePiece(Tokenizer):
    """A SentencePiece model."""

    type = "sentencepiece"
    file = "tokenizer.model"

    def __init__(self, model: bytes, where: str) -> None:
        """``where`` names the model in messages.

        Raises:
            UserError: it is no SentencePiece model, or has no end-of-sentence piece.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                where, "is not a SentencePiece model", "give a `.model` file that spm_train wrote"
            ) from error
        self._model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        if eos < 0:
            raise UserError(where, "has no end-of-sentence piece", "train it with an `eos_id`")
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), eos

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:  # noqa: D102
        rows = self._processor.encode(list(texts), num_threads=_cores())
        return [np.array(row, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:  # noqa: D102
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: str | Path) -> None:  # noqa: D102
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.file).write_bytes(self._model)
        self._save_info(directory)

    def save_huggingface(self, directory: str | Path) -> None:  # noqa: D102
        write_huggingface(self._model, Path(directory))


class HuggingFace(Tokenizer):
    """A ``tokenizer.json``, run by the ``tokenizers`` library.

    Special tokens that are spelt out in a text become those tokens, as in ``transformers``.
    """

    type = "huggingface"
    file = "tokenizer.json"
    _files = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    )  # fmt: skip

    def __init__(self, directory: Path) -> None:
        """``directory`` holds tokenizer.json and tokenizer_config.json.

        Raises:
            UserError: a file is missing or damaged, there is no end token, or no library.
        """
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                str(directory),
                "a Hugging Face tokenizer needs the `tokenizers` library",
                "pip install 'megatron-btx[hf]'",
            ) from error
        path = directory / self.file
        if not path.is_file():
            raise UserError(
                str(directory),
                "holds no tokenizer.json",
                "write one: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more precise
            raise UserError(
                str(path), f"is not a tokenizer ({error})", "download it again"
            ) from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._directory = directory
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.bos_id = self._special("bos_token")
        eos = self._special("eos_token")
        if eos is None:
            raise UserError(
                str(directory / "tokenizer_config.json"),
                "names no eos_token, which ends every document",
                "add `eos_token`",
            )
        self.eos_id = eos

    def _special(self, name: str) -> int | None:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            path = self._directory / file
            if not path.is_file():
                continue
            try:
                token = json.loads(path.read_text(encoding="utf-8")).get(name)
            except (ValueError, AttributeError) as error:
                raise UserError(str(path), f"is not a JSON object ({error})", "mend it") from error
            if token:
                return self._tokenizer.token_to_id(
                    token["content"] if isinstance(token, dict) else token
                )
        return None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:  # noqa: D102
        rows = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(row.ids, dtype=np.int32) for row in rows]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:  # noqa: D102
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, directory: str | Path) -> None:  # noqa: D102
        self.save_huggingface(directory)
        self._save_info(Path(directory))

    def save_huggingface(self, directory: str | Path) -> None:  # noqa: D102
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in self._files:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, directory / name)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote to ``directory``.

    Raises:
        UserError: there is none, or its file is not the one that was written.
    """
    directory = Path(directory)
    try:
        info = json.loads((directory / INFO).read_text(encoding="utf-8"))
        tokenizer = read_tokenizer(directory / info["file"], info["type"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(str(directory), "holds no tokenizer", "run the prepare stage") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            str(directory / INFO), "is damaged", "run the prepare stage again"
        ) from error
    if tokenizer.sha256 != info["sha256"]:
        raise UserError(
            str(directory / info["file"]),
            f"has changed: its sha256 is not the one in {INFO}",
            "restore it; models are trained with exactly one tokenizer",
        )
    return tokenizer


def read_tokenizer(path: str | Path, type_: str, *, where: str | None = None) -> Tokenizer:
    """A user's tokenizer: a SentencePiece ``.model``, or a Hugging Face directory; a directory that
    :meth:`Tokenizer.save` wrote will do for either.

    Raises:
        UserError: it is missing or unusable; ``where`` is the recipe's key, for messages.
    """
    path = Path(path)
    where = where or str(path)
    if not path.exists():
        raise UserError(where, f"{path} does not exist", "correct the path")
    if type_ == "huggingface":
        return HuggingFace(path if path.is_dir() else path.parent)
    if path.is_dir():
        path = path / SentencePiece.file
        if not path.is_file():
            raise UserError(where, f"{path} does not exist", "give a `.model` file")
    return SentencePiece(path.read_bytes(), str(path))


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


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, *, where: str) -> None:
    """That a model of ``vocab_size`` has a row for each token.

    Raises:
        UserError: the tokenizer is larger.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            where,
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}",
            "take the tokenizer that the model was trained with",
        )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)


def _cores() -> int:
    if threads := os.environ.get("RAYON_NUM_THREADS"):  # which `tokenizers` goes by
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
