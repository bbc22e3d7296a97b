"""When two tokenizers are one, and whose a mix gets."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.families.tokenizer_identity import differences
from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from tests.families.made import make
from tests.families.tokenizers_made import TEXT, llama3, mistral, qwen, spm

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

Raw = dict[str, Any]


def merges_as_strings(raw: Raw) -> None:
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]


def no_post_processor(raw: Raw) -> None:
    raw["post_processor"] = None


def offsets(raw: Raw) -> None:
    raw["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False


def defaults_left_out(raw: Raw) -> None:
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "byte_fallback", "fuse_unk"):
        del raw["model"][key]
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 9,
        "strategy": "LongestFirst",
        "stride": 0,
    }


SAME = [merges_as_strings, no_post_processor, offsets, defaults_left_out, lambda raw: None]


def swapped_ids(raw: Raw) -> None:
    vocab = raw["model"]["vocab"]
    vocab["!"], vocab["a"] = vocab["a"], vocab["!"]


def merges_in_another_order(raw: Raw) -> None:
    raw["model"]["merges"][3:5] = raw["model"]["merges"][4:2:-1]


def a_normaliser(raw: Raw) -> None:
    raw["normalizer"] = {"type": "NFC"}


def other_words(raw: Raw) -> None:
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"


def a_switch(raw: Raw) -> None:
    raw["model"]["ignore_merges"] = False


def an_added_token(raw: Raw) -> None:
    raw["added_tokens"][-1]["content"] = "<|tool|>"


def an_added_token_that_strips(raw: Raw) -> None:
    raw["added_tokens"][-1]["lstrip"] = True


OTHER: list[tuple[Callable[[Raw], None], str]] = [
    (swapped_ids, r"vocabulary: '!' is \d+, not 0 \(2 tokens differ\)"),
    (merges_in_another_order, "merges: from number 3 on"),
    (a_normaliser, 'normalizer: {"type": "NFC"}, not null'),
    (other_words, "pre_tokenizer: "),
    (a_switch, "model: "),
    (an_added_token, r"vocabulary: '<\|eot_id\|>' is absent, not \d+ \(2 tokens differ\)"),
    (an_added_token_that_strips, r"added tokens: '<\|eot_id\|>' \(1 differ\)"),
]


def changed(tmp_path: Path, change: Callable[[Raw], None]) -> tuple[Path, Path]:
    """A tokenizer, and its copy with a change and other white space."""
    one, other = llama3(tmp_path / "one"), llama3(tmp_path / "other")
    raw = json.loads((one / "tokenizer.json").read_text())
    change(raw)
    (other / "tokenizer.json").write_text(json.dumps(raw, indent=3))
    return one, other


@pytest.mark.parametrize("change", SAME)
def test_other_bytes_of_one_tokenizer(tmp_path, change):
    one, other = changed(tmp_path, change)
    files = [place / "tokenizer.json" for place in (one, other)]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert differences(one, other) == []
    loaded = [tokenizers.Tokenizer.from_file(str(file)) for file in files]
    for each in loaded:
        each.no_truncation()
    texts = [each.encode_batch(TEXT, add_special_tokens=False) for each in loaded]
    assert [one.ids for one in texts[0]] == [one.ids for one in texts[1]]


@pytest.mark.parametrize(("change", "found"), OTHER)
def test_what_differs_is_said(tmp_path, change, found):
    one, other = changed(tmp_path, change)
    said = differences(one, other)
    assert any(re.match(found, each) for each in said), said


def test_a_sentencepiece_model_and_its_tokenizer_json(tmp_path):
    """One has both files, the other a tokenizer.model or another tokenizer."""
    both = mistral(tmp_path / "both")
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "tokenizer.model").write_bytes(spm())
    assert differences(both, tmp_path / "slow") == []
    (both / "tokenizer.model").unlink()
    assert differences(both, tmp_path / "slow") == []
    (tmp_path / "slow" / "tokenizer.model").write_bytes(spm(split_digits=False, vocab_size=390))
    (said,) = differences(both, tmp_path / "slow")
    assert said.startswith("vocabulary: ")
    (tmp_path / "slow2").mkdir()
    (tmp_path / "slow2" / "tokenizer.model").write_bytes(spm(add_dummy_prefix=False))
    (tmp_path / "slow" / "tokenizer.model").write_bytes(spm())
    assert any("normalizer" in each for each in differences(tmp_path / "slow", tmp_path / "slow2"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"model": 5}', b"[" * 100_000, b"\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    one = llama3(tmp_path / "one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="is damaged") as caught:
        differences(one, tmp_path / "other")
    assert caught.value.where == str(tmp_path / "other" / "tokenizer.json")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    make("llama", place, vocab_size=512)
    return place


def model(weights: Path, out: Path, tokenizer: Callable[[Path], Path] | None) -> Path:
    shutil.copytree(weights, out)
    if tokenizer is not None:
        tokenizer(out)
    return out


def mixed(*sources: str, out: Path, **options: Any) -> str:
    said = io.StringIO()
    offline.run(MixRequest(sources=sources, out=str(out), **options), said)
    return said.getvalue()


def test_one_tokenizer_in_other_bytes_is_mixed(weights, tmp_path):
    a, b = (model(weights, tmp_path / name, llama3) for name in "ab")
    raw = json.loads((b / "tokenizer.json").read_text())
    merges_as_strings(raw)
    (b / "tokenizer.json").write_text(json.dumps(raw))
    said = mixed(f"a={a}", f"b={b}", out=tmp_path / "out")
    assert "tokenizer: that of a; chat template: none\n" in said
    files = [place / "tokenizer.json" for place in (a, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_tokenizer_is_refused_unless_the_user_vouches_for_it(weights, tmp_path):
    a, b = model(weights, tmp_path / "a", llama3), model(weights, tmp_path / "b", qwen)
    with pytest.raises(UserError, match="its tokenizer is not that of a: vocabulary: ") as caught:
        mixed(f"a={a}", f"b={b}", out=tmp_path / "out")
    assert "--tokenizer NAME" in str(caught.value)
    for name, found in (("c", "there is no source c"), ("none", "comes without a tokenizer")):
        plain = model(weights, tmp_path / f"without-{name}", None)
        with pytest.raises(UserError, match=found):
            mixed(f"a={a}", f"none={plain}", out=tmp_path / "out", tokenizer=name)
    said = mixed(f"a={a}", f"b={b}", out=tmp_path / "out", tokenizer="b")
    assert "tokenizer: that of b; chat template: its own\n" in said
    assert "tokenizer of a, left out: vocabulary: " in said
    files = [place / "tokenizer_config.json" for place in (b, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_source_without_tokenizer_is_told(weights, tmp_path):
    a, b = model(weights, tmp_path / "a", None), model(weights, tmp_path / "b", qwen)
    said = mixed(f"a={a}", f"b={b}", out=tmp_path / "of_b", dry_run=True)
    assert "tokenizer: that of b; a has none; chat template: its own\n" in said
    said = mixed(f"a={a}", f"b={b}", out=tmp_path / "of_b")
    assert (tmp_path / "of_b" / "tokenizer.json").read_bytes() == (
        b / "tokenizer.json"
    ).read_bytes()
    said = mixed(f"a={a}", out=tmp_path / "of_none", method="copy", format="megatron")
    assert "none of the sources has one" in said
    config = json.loads((b / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (b / "tokenizer_config.json").write_text(json.dumps(config))
    c = model(weights, tmp_path / "c", qwen)
    said = mixed(f"b={b}", f"c={c}", out=tmp_path / "of_c", dry_run=True)
    assert "tokenizer: that of b; chat template: none (c has one: --tokenizer c)\n" in said


def test_the_tokenizer_comes_along(weights, tmp_path):
    """To Megatron, with what it puts before a text, and back as it was."""
    source = model(weights, tmp_path / "in", llama3)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    mixed(str(source), out=tmp_path / "moe", method="upcycle", copies=2, format="megatron")
    said = json.loads((tmp_path / "moe" / "manifest.json").read_text())["tokenizer"]
    content = (source / "tokenizer.json").read_bytes()
    assert said["sha256"] == hashlib.sha256(content).hexdigest()
    tokenizer = load_tokenizer(tmp_path / "moe" / "tokenizer")
    assert tokenizer.describe() == said
    assert tokenizer.start_id == said["begin_token_id"] == tokenizer.bos_id
    mixed(str(tmp_path / "moe"), out=tmp_path / "back", method="copy")
    for name in ("tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_damaged_tokenizer_is_not_converted(weights, tmp_path):
    source = model(weights, tmp_path / "in", llama3)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        mixed(str(source), out=tmp_path / "out", method="copy", format="megatron")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
