"""Words that are encoded once: the ids are those of the library for the whole text."""

from __future__ import annotations

import io
import itertools
import pickle
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers

from megatron_btx.data import word_cache
from megatron_btx.data.builtin import text as builtin
from megatron_btx.data.tokenizer import SentencePiece, train_tokenizer
from tests.families.tokenizers_made import TEXT


@pytest.fixture(scope="module")
def documents() -> list[str]:
    sources = itertools.islice(builtin.stdlib_sources(), 40)
    return [*TEXT, *(source.read()[:10_000] for source in sources)]


MODELS: dict[str, dict[str, Any]] = {
    "a recipe's": {"add_dummy_prefix": False},
    "Llama 2's": {},
    "with symbols of its own": {
        "user_defined_symbols": ["\u2581\u2581if", "\n\n", "->", "\u2581\u2581"]
    },
    "words of several scripts": {"split_by_unicode_script": False},
    "pieces over spaces": {"split_by_whitespace": False},
    "a space at the end": {"treat_whitespace_as_suffix": True},
    "no bytes": {"byte_fallback": False},
    "NFKC": {"normalization_rule_name": "nmt_nfkc"},
    "spaces removed": {"remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram"},
}  # fmt: skip
BY_WORD = ("a recipe's", "Llama 2's", "with symbols of its own", "words of several scripts")
_PARTS = [
    " ", "  ", "\n", "\t", "\0", "\u2581", "\u3000", "\u0308", "\u2603\u2603", "if", "word", "->",
    "x1", "is", "the", "=", "self",
]  # fmt: skip


def _texts(parts: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.lists(st.sampled_from(parts) | st.characters(codec="utf-8")).map("".join))


@pytest.mark.parametrize("name", MODELS)
def test_ids_by_word_are_those_of_the_text(documents: list[str], name: str) -> None:
    """Whatever a model's settings: word by word where that is exact, else the library alone."""
    model = io.BytesIO()
    settings_ = {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, **MODELS[name],
    }  # fmt: skip
    text = "\n".join(documents).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text[:3000]), model_writer=model, vocab_size=600, minloglevel=2,
        allow_whitespace_only_pieces=True, **settings_,
    )  # fmt: skip
    tokenizer = SentencePiece(model.getvalue(), name)
    assert (word_cache.of_sentencepiece(model.getvalue()) is not None) == (name in BY_WORD)
    plain = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())

    @settings(max_examples=60, derandomize=True)
    @given(_texts(_PARTS))
    @example(["", " ", "  ", "\n", "\n\n", " a", "a ", "a  b", "  if", "\u2581a \u2581"])
    def same(texts: list[str]) -> None:
        assert [row.tolist() for row in tokenizer.encode(texts)] == plain.encode(texts)

    same()
    assert [row.tolist() for row in tokenizer.encode(documents)] == plain.encode(documents)


def test_words_are_forgotten(documents: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train_tokenizer(documents, 600, where="a test")
    cache = word_cache.of_sentencepiece(trained._model)
    assert cache is not None
    monkeypatch.setattr("megatron_btx.data.word_cache._LIMIT", 20)
    for number in range(30):
        text = f"some words and {number} more"
        assert cache.encode([text])[0].tolist() == trained.encode([text])[0].tolist()
        assert cache._characters <= 20 + len(text)


LLAMA_3, QWEN, GPT_2 = word_cache._SPLITS
_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _split(
    pattern: str, behavior: str = "isolated", *, invert: bool = False, digits: bool = False
) -> Any:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)
    first = [pre_tokenizers.Digits(individual_digits=False)] if digits else []
    return pre_tokenizers.Sequence([*first, split, _LEVEL])


_GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
FAST: dict[str, tuple[Any, bool]] = {
    "Llama 3": (_split(LLAMA_3), True),
    "Qwen": (_split(QWEN), True),
    "GPT-2's pattern": (_split(GPT_2), True),
    "GPT-2": (_GPT_2, True),
    "SmolLM": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), _GPT_2]), True),
    "Digits together": (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), _GPT_2]), True),
    "Digits and Llama 3": (_split(LLAMA_3, digits=True), True),
    "a space in front": (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
    "no pattern": (_LEVEL, False),
    "removed": (_split(LLAMA_3, "removed"), False),
    "inverted": (_split(LLAMA_3, invert=True), False),
    "another pattern": (_split(r"\w+|\W+"), False),
    "two patterns": (pre_tokenizers.Sequence([_split(QWEN), _split(LLAMA_3)]), False),
    "white space": (pre_tokenizers.Whitespace(), False),
    "none": (None, False),
}
_MARKS = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u2003",
    "\u2028", "a", "it", "Foo", "'s", "'S", "'", "(", "):", "...", "_", "<|", "1", "12", "1234",
    "\u00b2", "\u0663", "\u00bd", "\u00e9", "e\u0301", "\u0301", "=\u0338", "\u2019", "\u201c",
    "\u4e2d\u6587", "\u017f", "\u212a", "\u01c5", "\U0001f642", "\0", "\x7f", "<|end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def byte_level(documents: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE, with an added token that swallows the white space behind it."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = _split(LLAMA_3)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(documents, trainer)
    made.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, rstrip=True)])
    return made


@pytest.mark.parametrize("composes", [False, True])
@pytest.mark.parametrize("name", FAST)
def test_ids_by_word_are_those_of_tokenizers(
    byte_level: tokenizers.Tokenizer, documents: list[str], name: str, composes: bool
) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(byte_level.to_str())
    pre_tokenizer, by_word = FAST[name]
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.normalizer = normalizers.NFC() if composes else None
    cache = word_cache.of_fast(tokenizer)
    assert (cache is not None) == by_word
    if cache is None:
        return

    def check(texts: list[str]) -> None:
        wanted = [row.ids for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        assert [ids.tolist() for ids in cache.encode(texts)] == wanted

    @settings(max_examples=60, derandomize=True)
    @given(st.lists(st.lists(st.sampled_from(_MARKS) | st.characters(codec="utf-8")).map("".join)))
    @example(
        ["", " ", "\n", "1\n   \n a", "):\n\n   a", "(\n\n  x", "a<|end|> \n b", "\u2019\n \nb"]
    )
    def same(texts: list[str]) -> None:
        check(texts)

    same()
    check(documents)


def test_a_cache_goes_to_another_process_without_its_words(
    byte_level: tokenizers.Tokenizer, documents: list[str]
) -> None:
    trained = train_tokenizer(documents, 600, where="a test")
    for cache in (trained._words, word_cache.of_fast(byte_level)):
        assert cache is not None
        wanted = [ids.tolist() for ids in cache.encode(documents)]
        sent = pickle.dumps(cache)
        assert cache._ids
        again = pickle.loads(sent)
        assert not again._ids
        assert [ids.tolist() for ids in again.encode(documents)] == wanted


def test_what_else_has_no_cache(byte_level: tokenizers.Tokenizer) -> None:
    """Another normalizer or model, and merges left out by chance."""
    for change in (
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])},
        {"model": tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")},
        {"model": tokenizers.models.BPE({"a": 0}, [], dropout=0.1)},
    ):
        tokenizer = tokenizers.Tokenizer.from_str(byte_level.to_str())
        for name, value in change.items():
            setattr(tokenizer, name, value)
        assert word_cache.of_fast(tokenizer) is None
