"""What describes a model (config.json, manifest, arguments of Megatron-LM, run_config.yaml): every
value of a wrong type or beyond all sense is one error that names file and key."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.hf import FAMILIES, read_config
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.read_architecture import stated_vocabulary
from megatron_btx.recipe.schema import Model, Routing
from megatron_btx.weights.manifest import FORMAT, read_manifest
from megatron_btx.weights.megatron_lm_args import architecture_of, settings_of

MODEL = Model(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=64,
    max_position_embeddings=64,
)
DENSE = Architecture(model=MODEL, vocab_size=100)
MOE = Architecture(
    model=MODEL, vocab_size=100, experts=("a", "b", "c"), routing=Routing(moe_router_topk=2)
)
NO_COUNT = (0, -1, 2.5, 10**10, 10**30, math.nan, math.inf, "2", "two", True, [2], {"a": 1})
NO_NUMBER = (-1.0, math.nan, math.inf, "1e4", True, [1.0], {})
NO_SWITCH = ("false", "true", 0, 1, [True], {})


def cases() -> list[tuple[str, str, Any]]:
    """Family, key, value."""
    counts = ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"]
    counts += ["num_key_value_heads", "vocab_size", "max_position_embeddings"]
    found = [("llama", key, value) for key in counts for value in NO_COUNT]
    found += [("llama", key, v) for key in ("rope_theta", "rms_norm_eps") for v in NO_NUMBER]
    found += [("llama", "tie_word_embeddings", value) for value in NO_SWITCH]
    found += [("llama", "rope_scaling", v) for v in (3, "linear", [1], True)]
    found += [("llama", "rope_scaling", {"rope_type": "linear", "factor": v}) for v in NO_NUMBER]
    found += [("llama", "rope_scaling", {"rope_type": [1], "factor": 2.0})]
    found += [("mistral", "sliding_window", v) for v in (-1, 0.5, "8", [8], True, 10**30)]
    for key in ("num_local_experts", "num_experts_per_tok"):
        found += [("mixtral", key, value) for value in NO_COUNT]
    found += [("mixtral", "btx_experts", v) for v in ("a", 3, [1, 2, 3], {}, ["a", "a", "b"])]
    found += [("mixtral", "num_experts_per_tok", 4)]
    found += [("qwen3", "layer_types", v) for v in (3, [3, 4], [["full_attention"]], {"a": 1})]
    found += [("qwen3", "use_sliding_window", value) for value in NO_SWITCH]
    found += [("qwen3_moe", "norm_topk_prob", value) for value in NO_SWITCH]
    found += [("qwen3_moe", "moe_intermediate_size", value) for value in NO_COUNT]
    return found


def config_of(family: str) -> dict[str, Any]:
    return FAMILIES[family].write_config(DENSE if FAMILIES[family].fused is None else MOE)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_right_one_is_read(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(family)))
    found = read_config(tmp_path)[1]
    assert found.model.num_layers == 2
    assert len(found.experts) == (3 if FAMILIES[family].fused else 0)


@pytest.mark.parametrize(
    ("family", "key", "value"), cases(), ids=lambda part: str(part)[:40].replace("/", "_")
)
def test_config_json(family: str, key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of(family) | {key: value}))
    with pytest.raises(UserErrors) as caught:
        read_config(tmp_path)
    where = str(caught.value)
    assert where.startswith(str(path))
    assert key in where
    assert len(where) < 2000
    assert not any(error.what == "is missing" for error in caught.value.errors), where


def manifest_cases() -> list[tuple[str, Any, str]]:
    """Dotted key, value, what the error must say."""
    found = [
        (f"model.{key}", value, f"manifest.json: model.{key}: is ")
        for key in ("num_layers", "hidden_size", "ffn_hidden_size", "seq_length")
        for value in (None, *NO_COUNT)
    ]
    found += [("model.rotary_base", v, "manifest.json: model.rotary_base: is") for v in NO_NUMBER]
    switch = "model.untie_embeddings_and_output_weights"
    found += [(switch, v, f"{switch}: is") for v in (None, *NO_SWITCH)]
    found += [("vocab_size", value, "manifest.json: vocab_size: is ") for value in NO_COUNT]
    found += [(key, value, f"{key}: is") for key in ("model", "moe") for value in (3, [1], "x")]
    found += [
        ("model", None, "model.num_layers: is missing"),
        ("model.num_layers", 10**9, "model.num_layers: is 1000000000, out of range"),
        ("model.num_layerz", 3, "model.num_layerz: is not a key of a model"),
        ("model.num_attention_heads", 5, "hidden_size: 32 is not divisible"),
        ("model.window_size", [3], "model.window_size: is [3]"),
        ("model.window_size", ["3", 0], "model.window_size"),
        ("padded_vocab_size", 100, "padded_vocab_size: is 100, and 100 padded"),
        ("moe.experts", ["a", "b"], "moe.experts: names 2 experts of 3"),
        ("moe.experts", ["a", "b", "b"], "moe.experts: names an expert twice"),
        ("moe.experts", [["a"], "b", "c"], "moe.experts"),
        ("moe.routing.type", "best", "moe.routing.type: is 'best'"),
        ("moe.routing.moe_router_topk", 5, "moe.routing.moe_router_topk: is 5, of 3 experts"),
        ("moe.routing.moe_router_topk", "2", "moe.routing.moe_router_topk: is '2'"),
        ("format", "megatron_btx/9", "not of the format megatron_btx/1"),
        ("format", ["x"], "not of the format"),
        ("huggingface", ["x"], "huggingface: is a list, not a mapping"),
        ("huggingface", {"model_type": ["x"]}, "huggingface.model_type: is a list, not text"),
        ("huggingface", {"eos_token_id": "x"}, "huggingface.eos_token_id: is 'x', no token's id"),
        ("tokenizer", "x", "tokenizer: is text, not a mapping"),
        ("tokenizer", {}, "tokenizer.type: is missing"),
        ("tokenizer", {"type": "foo", "file": "x"}, "tokenizer.type: is 'foo'"),
        ("tokenizer", {"type": "sentencepiece", "file": 3}, "tokenizer.file: is 3, not text"),
        ("tokens", "abc", "tokens: is 'abc', not a whole number"),
        ("tokens", -1, "tokens: is -1, out of range"),
        ("layout", [], "layout: is a list, not a mapping"),
    ]
    return found


@pytest.mark.parametrize(
    ("key", "value", "words"), manifest_cases(), ids=lambda part: str(part)[:30].replace("/", "_")
)
def test_manifest(key: str, value: Any, words: str, tmp_path: Path) -> None:
    manifest = json.loads(json.dumps({"format": FORMAT, **MOE.to_json()}))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    assert read_manifest(tmp_path)[0] == MOE
    *blocks, last = key.split(".")
    block = manifest
    for name in blocks:
        block = block[name]
    block[last] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_entries_that_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for gone in ("model", "moe"):
        entries = {"format": FORMAT, **MOE.to_json()}
        del entries[gone]
        path.write_text(json.dumps(entries))
        with pytest.raises(UserErrors, match=f"manifest.json: {gone}: is missing"):
            read_manifest(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserError, match="holds no JSON object"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32000", 32000), ("1e999", None), ("-5", None), ("0", None), ("1e3", None), ("3.7", None),
        ("true", None), ('"32000"', None), ("1" + "0" * 90, None), ("1" + "0" * 5000, None),
        ("100000001", None), ("[5]", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "manifest.json"])
def test_a_stated_vocabulary_is_a_number_of_tokens(
    file: str, text: str, size: int | None, tmp_path: Path
) -> None:
    """What a recipe is planned with before its seed is opened."""
    (tmp_path / file).write_text(f'{{"vocab_size": {text}}}')
    assert stated_vocabulary(tmp_path) == size


SETTINGS = {**asdict(MODEL), "vocab_size": 100}


@pytest.mark.parametrize("value", NO_COUNT, ids=str)
@pytest.mark.parametrize(
    "key", ["num_layers", "hidden_size", "seq_length", "num_experts", "vocab_size"]
)
def test_arguments_of_megatron_lm(key: str, value: Any) -> None:
    if (key, value) == ("num_experts", 0) and value is not False:
        assert architecture_of(SETTINGS | {key: 0}, "x").experts == ()
        return
    with pytest.raises(UserErrors) as caught:
        architecture_of(SETTINGS | {key: value}, "iter_1")
    assert str(caught.value).startswith("iter_1")
    assert key in str(caught.value).replace("num_moe_experts", "num_experts")
    assert len(caught.value.errors) == 1, caught.value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_base", "1e4"), ("norm_epsilon", 1), ("norm_epsilon", [1]), ("window_size", "all"),
        ("use_rope_scaling", "yes"), ("share_embeddings_and_output_weights", "false"),
        ("moe_layer_freq", [[1], [1]]), ("qk_layernorm", 1), ("rope_scaling_factor", math.nan),
    ],
)  # fmt: skip
def test_other_arguments(key: str, value: Any) -> None:
    with pytest.raises(UserErrors) as caught:
        architecture_of(SETTINGS | {"num_experts": 4, key: value}, "iter_1")
    assert key in str(caught.value)


def test_configuration_of_megatron_bridge(tmp_path: Path) -> None:
    """Its numbers are YAML's: `5e5` is one."""
    path = tmp_path / "run_config.yaml"
    text = yaml.safe_dump({"model": json.loads(json.dumps(SETTINGS))})
    path.write_text(text.replace("rotary_base: 10000.0", "rotary_base: 5e5"))
    architecture = architecture_of(settings_of(tmp_path) or {}, str(path))
    assert architecture.model.rotary_base == 500_000.0
    for old, new, words in (
        ("num_layers: 2", "num_layers: 2\n  num_layers: 3", "num_layers: is set twice"),
        ("num_layers: 2", "num_layers: [2]", "num_layers: is a list, not a whole number"),
        ("num_layers: 2", "num_layers: 1e9", "num_layers: is 1000000000, out of range"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=words):
            architecture_of(settings_of(tmp_path) or {}, str(path))


def test_words_that_nobody_looks_at_are_refused(tmp_path: Path) -> None:
    given = SETTINGS | {"num_layer": 3}
    with pytest.raises(UserErrors, match=r"model\.num_layer: .* did you mean `num_layers`"):
        read_manifest(tmp_path, given)
