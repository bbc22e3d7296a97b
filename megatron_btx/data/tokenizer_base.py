"""The interface of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from megatron_btx.errors import UserError, shown
from megatron_btx.files import write_json
from megatron_btx.recipe.load import digest

INFO = "tokenizer_info.json"
"""File beside the tokenizer's own, with the content of :meth:`Tokenizer.describe`."""


class Tokenizer(ABC):
    """Text to token ids and back."""

    type: Literal["sentencepiece", "huggingface"]
    file: str
    """Name of its defining file."""
    sha256: str
    """Of that file's bytes."""
    settings: Mapping[str, str] = MappingProxyType({})
    """Name -> sha256 of the files beside it that count."""
    vocab_size: int
    """One more than the largest id."""
    bos_id: int | None
    eos_id: int
    """Ends every document."""
    begin_id: int | None
    """The token it adds before a text if special tokens are requested; ``None``: none."""

    @property
    def identity(self) -> str:
        """Hash (hex) of all that decides the ids of a text and of its end."""
        return digest([self.sha256, dict(self.settings)]) if self.settings else self.sha256

    @property
    def start_id(self) -> int:
        """The token before a text that is evaluated or continued: ``begin_id``, else the end token,
        which precedes a document in training."""
        return self.eos_id if self.begin_id is None else self.begin_id

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int32 [n]; no special token is added. May use all cores."""

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
        """Check that a model of ``vocab_size`` has a row for each of ``ids``. A tokenizer may have
        more tokens than the model (CodeLlama-Python's has four more) if no text contains them.

        Raises:
            UserError: an id is too large; ``where`` names the text.
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
        """Its entry in a manifest."""
        begin = {} if self.begin_id is None else {"begin_token_id": self.begin_id}
        return {"type": self.type, "file": self.file, "sha256": self.sha256, **begin}

    def _save_info(self, directory: Path) -> None:
        write_json(directory / INFO, self.describe())
