"""A Hugging Face ``tokenizer.json``, run by the ``tokenizers`` library as ``transformers`` does."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_btx.data import word_cache
from megatron_btx.data.tokenizer_base import Tokenizer
from megatron_btx.errors import UserError
from megatron_btx.families.tokenizer_libraries import begin_token, no_panic, open_fast
from megatron_btx.families.tokenizer_settings import CONFIG, hashes, read_settings


class HuggingFace(Tokenizer):
    """A ``tokenizer.json`` with the settings in the files of ``transformers`` beside it.

    As in ``transformers``, special tokens spelt out in a text become those tokens, unless
    tokenizer_config.json sets ``split_special_tokens``.
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
            UserErrors: a file is missing or damaged, there is no end token, or no library.
        """
        path = directory / self.file
        if not path.is_file():
            raise UserError(
                str(directory),
                "holds no tokenizer.json",
                "write one: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )
        settings = read_settings(directory)
        self._tokenizer = open_fast(path, settings)
        self._words = word_cache.of_fast(self._tokenizer)
        self._directory = directory
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.settings = hashes(directory)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        ids = {name: vocabulary[token.content] for name, token in settings.named.items()}
        self.bos_id = ids.get("bos_token")
        if "eos_token" not in ids:
            raise UserError(
                str(directory / CONFIG),
                "names no eos_token, which ends every document",
                "add `eos_token`",
            )
        self.eos_id = ids["eos_token"]
        self.begin_id = begin_token(self._tokenizer, str(path))

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:  # noqa: D102
        with no_panic(str(self._directory / self.file)):
            if self._words is not None:
                return self._words.encode(texts)
            rows = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        found = (row.ids for row in rows)
        return [np.fromiter(ids, np.int32, len(ids)) for ids in found]

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
