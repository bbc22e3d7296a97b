"""Tokenizers as they are released: the ids, begin and end token that ``transformers`` gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.data.tokenizer import INFO, load_tokenizer, read_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.families.tokenizer_files import tokenizer_files
from tests.families.tokenizers_made import MADE, TEXT, llama3, mistral, qwen, slow, spm

transformers = pytest.importorskip("transformers")


def kind(directory: Path) -> str:
    return "huggingface" if (directory / "tokenizer.json").exists() else "sentencepiece"


@pytest.mark.parametrize("name", MADE)
def test_the_begin_token_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    make, begins = MADE[name]
    directory = make(tmp_path / "in")
    ours = read_tokenizer(directory, kind(directory))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert (ours.begin_id is not None) == begins
    assert ours.start_id == (theirs.bos_token_id if begins else theirs.eos_token_id)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    # Before a leading space and behind a special token that is spelt out, the versions of
    # LlamaTokenizer disagree about the space that they put there.
    plain = [text for text in TEXT if "</s>" not in text or name in ("Llama 3", "Qwen")]
    for text, ids in zip(plain, ours.encode(plain), strict=True):
        assert theirs(text)["input_ids"] == [ours.start_id] * begins + ids.tolist()
    # A Megatron copy says it in its manifest, and answers alike.
    for path, content in tokenizer_files(directory, megatron=True).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    copied = load_tokenizer(tmp_path / "tokenizer")
    info = json.loads((tmp_path / "tokenizer" / INFO).read_text())
    assert info == copied.describe() == ours.describe()
    assert info.get("begin_token_id") == ours.begin_id
    assert copied.start_id == ours.start_id
    # Saved by a stage and loaded again.
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.describe() == ours.describe()
    assert (again.bos_id, again.eos_id) == (ours.bos_id, ours.eos_id)
    # Exported.
    ours.save_huggingface(tmp_path / "out")
    out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = TEXT if kind(directory) == "sentencepiece" else plain
    for text, ids in zip(texts, ours.encode(texts), strict=True):
        assert out(text)["input_ids"] == [ours.start_id] * begins + ids.tolist()


def test_an_answer_that_is_no_longer_true_is_noticed(tmp_path: Path) -> None:
    read_tokenizer(slow(tmp_path / "in", add_bos_token=True), "sentencepiece").save(tmp_path / "a")
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"add_bos_token": true', '"add_bos_token": false'))
    with pytest.raises(UserError, match="puts None before a text, not 1 as tokenizer_info.json"):
        load_tokenizer(tmp_path / "a")


def test_tokens_of_the_configuration_are_added_as_by_transformers(tmp_path: Path) -> None:
    """A special token that tokenizer.json has in its vocabulary only: text makes it all the
    same."""
    directory = llama3(tmp_path)
    path, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    raw, said = json.loads(path.read_text()), json.loads(config.read_text())
    (moved,) = [t for t in raw["added_tokens"] if t["content"] == "<|eot_id|>"]
    raw["added_tokens"].remove(moved)
    raw["model"]["vocab"]["<|eot_id|>"] = moved["id"]
    path.write_text(json.dumps(raw))
    del said["added_tokens_decoder"]
    config.write_text(json.dumps(said | {"additional_special_tokens": ["<|eot_id|>"]}))
    text = "a<|eot_id|> b<|end_of_text|>"
    (ids,) = read_tokenizer(directory, "huggingface").encode([text])
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert moved["id"] in ids


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_in_text_follow_split_special_tokens(tmp_path: Path, split: bool) -> None:
    directory = llama3(tmp_path)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"split_special_tokens": split}))
    text = "a<|eot_id|>b <|end_of_text|>"
    ours = read_tokenizer(directory, "huggingface")
    ids = ours.encode([text])[0].tolist()
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert (ours.eos_id in ids) is not split


@pytest.mark.parametrize("name", ["Llama 3", "Qwen", "Mistral"])
def test_a_space_that_the_two_files_disagree_about(tmp_path: Path, name: str) -> None:
    """Qwen2Tokenizer and LlamaTokenizer follow the one, PreTrainedTokenizerFast the other."""
    directory = MADE[name][0](tmp_path)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    does = name == "Mistral"
    path.write_text(json.dumps(config | {"add_prefix_space": does}))
    assert read_tokenizer(directory, "huggingface").encode(["a"])
    path.write_text(json.dumps(config | {"add_prefix_space": not does}))
    with pytest.raises(UserError, match=f"add_prefix_space is {not does}, and tokenizer.json"):
        read_tokenizer(directory, "huggingface")


SLOW: list[tuple[dict[str, Any], str]] = [
    ({"added_tokens.json": {"<pad>": 400}}, r"'<pad>' \(400\) is added"),
    ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, r"'<\|im_end\|>' is added"),
    ({"tokenizer_config.json": {"eos_token": {"content": "\u2581the"}}}, "'\u2581the' is added"),
    ({"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "</s>"}}}},
     r"'</s>' \(7\) is added"),
    ({"tokenizer_config.json": {"additional_special_tokens": ["<tool>"]}}, "'<tool>' is added"),
    ({"tokenizer_config.json": {"add_prefix_space": False}}, "add_prefix_space is False"),
    ({"tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"}}, "XLMRobertaTokenizer"),
    ({"tokenizer_config.json": {"sp_model_kwargs": {"alpha": 1}}}, "sp_model_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("files", "found"), SLOW)
def test_what_a_slow_tokenizer_adds_is_refused(
    tmp_path: Path, files: dict[str, Any], found: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(UserError, match=found) as caught:
            read_tokenizer(path, "sentencepiece")
        assert "write a tokenizer.json" in str(caught.value)


def test_a_slow_tokenizer_s_end_token_is_the_one_named(tmp_path: Path) -> None:
    """``special_tokens_map.json`` counts above ``tokenizer_config.json``, as in transformers."""
    (tmp_path / "tokenizer.model").write_bytes(spm())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<unk>"}}')
    ours = read_tokenizer(tmp_path, "sentencepiece")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.eos_id == theirs.eos_token_id == 0
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_id == 0


@pytest.mark.parametrize("path", ["", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("type_", ["sentencepiece", "huggingface"])
def test_a_hugging_face_tokenizer_is_recognised(tmp_path: Path, path: str, type_: str) -> None:
    """Whatever the recipe's ``type`` says, which has a default."""
    found = read_tokenizer(llama3(tmp_path) / path, type_)
    assert found.type == "huggingface"


def test_of_two_files_the_type_chooses(tmp_path: Path) -> None:
    mistral(tmp_path)
    for type_ in ("sentencepiece", "huggingface"):
        assert read_tokenizer(tmp_path, type_).type == type_
    assert read_tokenizer(tmp_path / "tokenizer.model", "huggingface").type == "sentencepiece"
    assert read_tokenizer(tmp_path / "tokenizer.json", "sentencepiece").type == "huggingface"


BAD: list[tuple[str, bytes]] = [
    *[("tokenizer_config.json", content) for content in (
        b"[]", b"7", b"[" * 100_000, b"\xff\xfe", b'{"eos_token": 5}', b'{"eos_token": []}',
        b'{"eos_token": {"content": 5}}', b'{"eos_token": "nowhere"}', b"{}",
        b'{"eos_token": {"content": "<|im_end|>", "lstrip": 7}}',
        b'{"added_tokens_decoder": []}', b'{"added_tokens_decoder": {"x": "y"}}',
        b'{"added_tokens_decoder": {"-1": {"content": "y"}}}',
        b'{"added_tokens_decoder": {"5": 5}}',
        b'{"additional_special_tokens": "x"}', b'{"additional_special_tokens": [{}]}',
        b'{"eos_token": "<|im_end|>", "split_special_tokens": "no"}',
    )],
    *[("special_tokens_map.json", content) for content in (b"[", b'{"bos_token": [1]}')],
    *[("tokenizer.json", content) for content in (
        b"", b"{}", b"[]", b"{", b"\0" * 64, b'{"model": 7}', b'{"model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": [], "merges": {}}}', b"[" * 100_000,
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b c"]}}',
        # A template whose token is not among its special ones: the library panics.
        b'{"model": {"type": "WordLevel", "vocab": {"a": 0, "<|im_end|>": 1, "<|endoftext|>": 2,'
        b' "<|im_start|>": 3}, "unk_token": "a"}, "post_processor": {"type": "TemplateProcessing",'
        b' "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],'
        b' "special_tokens": {}}}',
    )],
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), BAD)
def test_damaged_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes) -> None:
    directory = qwen(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_tokenizer(directory, "huggingface")
    assert str(tmp_path) in str(caught.value)
    assert "fix: " in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("change", [
    lambda model: b"", lambda model: b"no model", lambda model: model[:-7],
    lambda model: model[: len(model) // 2], lambda model: model.replace(b"</s>", b"\xff/s>"),
    lambda model: model.replace("\u2581t".encode(), b"\xe2\x96\x81\xa3", 1),
])  # fmt: skip
def test_a_damaged_sentencepiece_model_is_one_clear_error(tmp_path: Path, change: Any) -> None:
    """Cut, or with bytes that are no text."""
    (tmp_path / "tokenizer.model").write_bytes(change(spm()))
    with pytest.raises(UserError, match="is not a SentencePiece model") as caught:
        read_tokenizer(tmp_path, "sentencepiece")
    assert caught.value.where == str(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"type": 5}', '{"type": "huggingface"}', '{"type": [], "file": "x"}',
     '{"type": "sentencepiece", "file": "../../x", "sha256": "0"}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_tokenizer_info(tmp_path: Path, content: str) -> None:
    read_tokenizer(llama3(tmp_path / "in"), "huggingface").save(tmp_path / "saved")
    (tmp_path / "saved" / INFO).write_text(content)
    with pytest.raises(UserError, match=INFO):
        load_tokenizer(tmp_path / "saved")
