"""Small tokenizers with the files and settings of the released families."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_btx.data.tokenizer_sentencepiece import SentencePiece

TEXT = [
    "The quick brown fox jumps over 13 lazy dogs, and 2,048 wizards mix jars of quartz.",
    "def f(x):\n    return x ** 2  # caf\u00e9, \u6f22\u5b57, \U0001f600",
    "  two spaces, a\ttab and </s> or <|end_of_text|> in the text",
    "Once upon a time there was a model that read what it wrote.",
]
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Llama 3's and Qwen's, which differ in how many digits are one word."""


def _byte_level(special: list[str], post: bool) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=post))
    made.normalizer = None if post else normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_SPLIT.replace("DIGITS", "{1,3}" if post else "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXT * 20, trainer)
    made.add_special_tokens(special)
    byte = processors.ByteLevel(trim_offsets=False)
    made.post_processor = byte
    if post:
        begin = special[0]
        template = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
            special_tokens=[(begin, made.token_to_id(begin))],
        )  # fmt: skip
        made.post_processor = processors.Sequence([byte, template])
    return made


def _write(directory: Path, files: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        is_bytes = isinstance(content, bytes)
        data = content if is_bytes else json.dumps(content, ensure_ascii=False).encode()
        (directory / name).write_bytes(data)
    return directory


def llama3(directory: Path) -> Path:
    """The begin token by post-processor alone; no flag speaks of it."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    made = _byte_level(special, post=True)
    decoder = {
        str(made.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False,
                                   "rstrip": False, "single_word": False, "special": True}
        for t in special
    }  # fmt: skip
    config = {
        "added_tokens_decoder": decoder, "bos_token": special[0], "eos_token": special[1],
        "clean_up_tokenization_spaces": True, "model_max_length": 131072,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    mapped = {name: config[name] for name in ("bos_token", "eos_token")}
    return _write(directory, {
        "tokenizer.json": made.to_str().encode(), "tokenizer_config.json": config,
        "special_tokens_map.json": mapped,
    })  # fmt: skip


def qwen(directory: Path) -> Path:
    """None, though the flag and a bos_token are there to be misread."""
    made = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], post=False)
    config = {
        "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "split_special_tokens": False,
        "errors": "replace", "tokenizer_class": "Qwen2Tokenizer", "chat_template": "{{ messages }}",
    }  # fmt: skip
    return _write(directory, {
        "tokenizer.json": made.to_str().encode(), "tokenizer_config.json": config,
    })  # fmt: skip


@functools.cache
def spm(**options: Any) -> bytes:
    """A SentencePiece model with Llama 2's settings."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "split_digits": True,
        "minloglevel": 2, "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    }  # fmt: skip
    lines = [line for text in TEXT for line in text.splitlines()] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **(settings | options)
    )
    return model.getvalue()


_LLAMA = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False,
    "clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizerFast",
}  # fmt: skip


def _llama2(directory: Path, begin: bool, **more: Any) -> Path:
    own = SentencePiece(spm(), "spm")
    own.begin_id = own.bos_id if begin else None
    own.save_huggingface(directory)
    return _write(directory, {"tokenizer_config.json": {**_LLAMA, **more}})


def mistral(directory: Path) -> Path:
    """By post-processor and flag, as Llama 2 too."""
    return _llama2(directory, True, add_bos_token=True, add_eos_token=False)


def without_post_processor(directory: Path) -> Path:
    """A class whose name promises a begin token, and no post-processor that puts it there."""
    return _llama2(directory, False)


def slow(directory: Path, **more: Any) -> Path:
    """A SentencePiece model without tokenizer.json."""
    return _write(directory, {
        "tokenizer.model": spm(),
        "tokenizer_config.json": {**_LLAMA, "tokenizer_class": "LlamaTokenizer", **more},
    })  # fmt: skip


def slow_with_begin(directory: Path) -> Path:
    """The flag counts, because there is nothing else."""
    return slow(directory, add_bos_token=True, add_eos_token=False)


def slow_code_llama(directory: Path) -> Path:
    """A class that puts it there where nothing is said."""
    return slow(directory, tokenizer_class="CodeLlamaTokenizer")


MADE: dict[str, tuple[Callable[[Path], Path], bool]] = {
    "Llama 3": (llama3, True),
    "Mistral": (mistral, True),
    "LlamaTokenizerFast without post-processor": (without_post_processor, False),
    "Qwen": (qwen, False),
    "slow": (slow, False),
    "slow, begin": (slow_with_begin, True),
    "slow, CodeLlama": (slow_code_llama, True),
}
"""How it is made, and whether it puts a begin token before a text."""
