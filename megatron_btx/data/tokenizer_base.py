"""What every tokenizer does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_btx.errors import UserError, shown
from megatron_btx.files import write_json

INFO = "tokenizer_info.json"
"""Beside the tokenizer's own file: what :meth:`Tokenizer.describe` gives."""


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
    begin_id: int | None
    """What it puts before a text where special tokens are asked for; ``None``: nothing."""

    @property
    def start_id(self) -> int:
        """What stands before a text whose loss is measured or that is continued: what the tokenizer
        puts there, else the token that ends documents, because in training one document follows the
        other."""
        return self.eos_id if self.begin_id is None else self.begin_id

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

    def check_ids(self, ids: np.ndarray, vocab_size: int, *, where: str) -> None:
        """That a model of ``vocab_size`` has a row for each of ``ids``. A tokenizer may have tokens
        more (CodeLlama-Python's has four) that no text makes; behind a model's own rows lie those
        that pad them.

        Raises:
            UserError: it has none; ``where`` says of what.
        """
        if len(ids) and int(ids.max()) >= vocab_size:
            token = int(ids.max())
            text = shown(repr(self.decode([token])))
            raise UserError(
                where,
                f"holds the token {text} ({token}), and the model's vocabulary has {vocab_size}",
                "take the tokenizer that the model was trained with",
            )

    def describe(self) -> dict[str, Any]:
        """What a manifest holds of it."""
        begin = {} if self.begin_id is None else {"begin_token_id": self.begin_id}
        return {"type": self.type, "file": self.file, "sha256": self.sha256, **begin}

    def _save_info(self, directory: Path) -> None:
        write_json(directory / INFO, self.describe())
