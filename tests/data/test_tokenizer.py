"""Tokenizers: there and back, the same twice, and the same ids in transformers."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_btx.data.tokenizer import (
    INFO,
    HuggingFace,
    SentencePiece,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
    read_tokenizer,
    train_tokenizer,
)
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Recipe
from tests.data.oracle import texts

Prepared = tuple[Recipe, Path]


@pytest.fixture(scope="module")
def documents(prepared: Prepared) -> dict[str, list[str]]:
    recipe, run_dir = prepared
    corpus = run_dir / "prepare" / "corpus"
    return {name: texts(corpus / name / "valid.jsonl") for name in recipe.domains}


@pytest.fixture(scope="module")
def trained(prepared: Prepared) -> Tokenizer:
    return load_tokenizer(prepared[1] / "prepare" / "tokenizer")


@pytest.fixture(scope="module")
def exported(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    trained.save_huggingface(directory)
    return directory


def test_what_llama_cpp_reads_is_said(exported: Path) -> None:
    """Its converter takes the space in front from here, and assumes one where nothing is said."""
    config = json.loads((exported / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is False
    assert config["add_bos_token"] is False


def test_pieces(trained: Tokenizer, prepared: Prepared) -> None:
    assert trained.vocab_size == prepared[0].tokenizer.vocab_size
    assert (trained.bos_id, trained.eos_id) == (1, 2)
    (ids,) = trained.encode(["x = 1234\n"])
    assert ids.dtype == np.int32
    digits = [trained.decode([i]) for i in ids][-5:-1]
    assert digits == list("1234")


def test_there_and_back(trained: Tokenizer, documents: dict[str, list[str]]) -> None:
    for domain in documents.values():
        assert [trained.decode(ids) for ids in trained.encode(domain)] == domain


PLAIN = st.sampled_from("ab el\n\t  \u00e9\u6f22\U0001f600\0_=().0<s>/|end unknown begi")
ANY = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")  # its sign for a space
TEXT = st.text(PLAIN | ANY, max_size=60)


@settings(max_examples=300)
@given(text=TEXT)
@example("<|end|>")
@example(" a<|begin|>b <|unknown|>\n<|end|><|end|>")
def test_any_text(trained: Tokenizer, exported: Path, text: str) -> None:
    (ids,) = trained.encode([text])
    assert trained.decode(ids) == text
    assert ids.tolist() == _library(exported).encode([text])[0].tolist()
    assert ids.tolist() == _transformers(exported)(text)["input_ids"]
    assert not {0, 1, 2} & set(ids.tolist())  # text never makes a special token


@functools.cache
def _library(directory: Path) -> HuggingFace:
    return HuggingFace(directory)


@functools.cache
def _transformers(directory: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("model_type", [None, "mixtral", "llama"])
def test_transformers_gives_the_same_ids(
    trained: Tokenizer, exported: Path, documents: dict[str, list[str]], model_type: str | None,
    tmp_path: Path,
) -> None:  # fmt: skip
    transformers = pytest.importorskip("transformers")
    trained.save_huggingface(tmp_path)
    if model_type is not None:  # as it lies beside an exported model
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == trained.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (trained.bos_id, trained.eos_id)
    for name, domain in documents.items():
        ours = [ids.tolist() for ids in trained.encode(domain)]
        assert theirs(domain)["input_ids"] == ours, name
        assert [theirs.decode(ids) for ids in ours] == domain, name


def test_hugging_face_directory(exported: Path, trained: Tokenizer, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(exported, "huggingface")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (
        trained.vocab_size, trained.bos_id, trained.eos_id,
    )  # fmt: skip
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.describe() == tokenizer.describe()
    text = "def f(x):\n    return x ** 2  # caf\u00e9\n"
    assert again.encode([text])[0].tolist() == trained.encode([text])[0].tolist()
    assert again.decode(again.encode([text])[0]) == text


def test_llama_like_model_with_a_space_in_front(
    documents: dict[str, list[str]], tmp_path: Path
) -> None:
    """Llama-2's own settings: a dummy prefix, <s> and </s>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(documents["prose"]).splitlines()), model_writer=model,
        model_type="bpe", vocab_size=400, byte_fallback=True, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    (tmp_path / "llama.model").write_bytes(model.getvalue())
    given = read_tokenizer(tmp_path / "llama.model", "sentencepiece")
    given.save_huggingface(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True
    for domain in documents.values():
        ours = given.encode(domain)
        theirs = HuggingFace(tmp_path / "hf").encode(domain)
        assert [ids.tolist() for ids in ours] == [ids.tolist() for ids in theirs]
        assert [given.decode(ids) for ids in ours] == domain


@pytest.mark.parametrize("threads", ["junk", "0", "-1", "2"])
def test_a_number_of_threads_that_is_none(
    trained: Tokenizer, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    """`tokenizers` passes over what is no number, and so do we."""
    wanted = trained.encode(["one two"])[0].tolist()
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    assert trained.encode(["one two"])[0].tolist() == wanted


def test_training_is_deterministic(documents: dict[str, list[str]]) -> None:
    one, two = (train_tokenizer(documents["code"], 400, where="x") for _ in range(2))
    assert one.sha256 == two.sha256


def test_no_torch() -> None:
    program = (
        "import sys\n"
        "from megatron_btx.data import documents, prepare, tokenizer\n"
        "t = tokenizer.train_tokenizer(['some words to learn from. ' * 9] * 9, 280, where='x')\n"
        "t.encode(['words'])\n"
        "assert 'torch' not in sys.modules and 'megatron.core' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


def test_bad_tokenizers(exported: Path, trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        read_tokenizer(tmp_path / "x.model", "sentencepiece")
    with pytest.raises(UserError, match="does not exist") as error:
        read_tokenizer(tmp_path / "none", "huggingface", where="tokenizer.path")
    assert error.value.where == "tokenizer.path"
    with pytest.raises(UserError, match="no tokenizer.json"):
        read_tokenizer(tmp_path, "huggingface")
    with pytest.raises(UserError, match="tokenizer.model: does not exist, nor does tokenizer.json"):
        read_tokenizer(tmp_path, "sentencepiece")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        read_tokenizer(tmp_path, "huggingface")
    (tmp_path / "tokenizer.json").write_bytes((exported / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="eos_token"):
        read_tokenizer(tmp_path, "huggingface")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match="JSON"):
        read_tokenizer(tmp_path, "huggingface")
    with pytest.raises(UserError, match="512 tokens, the model's vocabulary 500"):
        check_vocabulary(trained, 500, where="tokenizer.path")
    check_vocabulary(trained, 512, where="tokenizer.path")


def test_a_changed_tokenizer_is_noticed(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    info = json.loads((tmp_path / INFO).read_text())
    (tmp_path / INFO).write_text(json.dumps({**info, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="has changed"):
        load_tokenizer(tmp_path)
    (tmp_path / INFO).write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(tmp_path)


def test_too_little_text_for_the_vocabulary() -> None:
    for size in (100, 30_000):
        with pytest.raises(UserError, match=f"{size} pieces") as error:
            train_tokenizer(["only a few words"], size, where="tokenizer.vocab_size")
        assert error.value.where == "tokenizer.vocab_size"


def test_a_model_that_transformers_cannot_have(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 50), model_writer=model,
        vocab_size=25, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = SentencePiece(model.getvalue(), "x")
    with pytest.raises(UserError, match=r"not BPE.*byte fallback.*normalises"):
        tokenizer.save_huggingface(tmp_path / "out")
    assert not (tmp_path / "out").exists()
