"""Directories of Megatron-Bridge read, mixed and written; real.py has seen that those of made.py
are its own, and that it exports what is written here."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_btx.errors import UserError
from megatron_btx.families.megatron_bridge import RUN_CONFIG, run_config
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Routing
from megatron_btx.weights.megatron_lm_args import architecture_of, settings_of
from tests.families import tokenizers_made
from tests.megatron_bridge.cases import CASES, converted, make_source, mixed, same_model
from tests.megatron_bridge.made import make_bridge

pytest.importorskip("transformers")

DENSE = Architecture(
    model=Model(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2
    ),
    vocab_size=70,
)
MOE = replace(DENSE, experts=("a", "b", "c"), routing=Routing())


@pytest.mark.parametrize("case", CASES)
def test_a_directory_gives_hugging_face_back(case, tmp_path):
    source = make_source(case, tmp_path / "hf")
    step = make_bridge(source, tmp_path / "bridge")
    back = converted(step, tmp_path / "back", "hf")
    assert list(same_model(source, back)) == []
    again = converted(converted(step, tmp_path / "ours", "megatron"), tmp_path / "again", "hf")
    assert list(same_model(source, again)) == []
    said = [json.loads((one / "generation_config.json").read_text()) for one in (back, again)]
    assert said[0] == said[1]
    assert said[0]["eos_token_id"] is not None


def test_two_of_them_and_one_beside_hugging_face_are_mixed(tmp_path):
    sources = [make_source("llama", tmp_path / f"hf{at}", seed=at) for at in (1, 2)]
    steps = [make_bridge(source, tmp_path / f"b{at}") for at, source in enumerate(sources)]
    expected = mixed(sources, tmp_path / "expected", "hf")
    for name, given in (("two", steps), ("last", [sources[0], steps[1]])):
        assert list(same_model(expected, mixed(given, tmp_path / name, "hf"))) == []
    ours = mixed(steps, tmp_path / "ours", "megatron")
    assert list(same_model(expected, converted(ours, tmp_path / "out", "hf"))) == []


def test_another_tokenizer_is_refused(tmp_path):
    sources = [make_source("llama", tmp_path / f"hf{at}", seed=at) for at in (1, 2)]
    steps = [make_bridge(source, tmp_path / f"b{at}") for at, source in enumerate(sources)]
    tokenizers_made.qwen(steps[1] / "tokenizer")
    with pytest.raises(UserError, match="its tokenizer is not that of a"):
        mixed(steps, tmp_path / "out", "hf")


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_has_every_name_that_it_writes(case, tmp_path):
    source = make_source(case, tmp_path / "hf")
    theirs = _known(make_bridge(source, tmp_path / "bridge"))
    ours = _known(converted(source, tmp_path / "ours", "megatron"))
    assert theirs.keys() - ours.keys() == {"common_state/shard_0_1"}  # common.pt
    padded = ("embedding.word_embeddings.weight", "output_layer.weight")
    for name, entry in theirs.items():
        if hasattr(entry, "size") and name not in padded:
            assert ours[name].size == entry.size, name


def _known(step: Path) -> dict:
    return pickle.loads((step / ".metadata").read_bytes()).state_dict_metadata


@pytest.mark.parametrize(
    "architecture",
    [
        DENSE,
        replace(DENSE, model=replace(DENSE.model, untie_embeddings_and_output_weights=False)),
        replace(
            DENSE,
            model=replace(
                DENSE.model, add_qkv_bias=True, window_size=(6, 0), window_attn_skip_freq=(1, 0)
            ),
        ),
        replace(DENSE, model=replace(DENSE.model, rope_scaling=True, rope_scaling_factor=32.0)),
        replace(DENSE, model=replace(DENSE.model, seq_len_interpolation_factor=4.0)),
        MOE,
        replace(
            MOE,
            model=replace(
                MOE.model,
                qk_layernorm=True,
                moe_ffn_hidden_size=24,
                moe_shared_expert_intermediate_size=16,
                moe_shared_expert_gate=True,
            ),
            routing=Routing(moe_router_topk=1, moe_router_pre_softmax=True),
        ),
        replace(MOE, routing=Routing(type="switch")),
    ],
)
def test_the_configuration_says_the_same_model(architecture, tmp_path):
    written = run_config(architecture, "bf16")
    assert written is not None
    (tmp_path / RUN_CONFIG).write_bytes(written)
    found = architecture_of(settings_of(tmp_path) or {}, str(tmp_path))
    assert run_config(found, "bf16") == written
    assert found.model.kv_channels == 8
    assert found.vocab_size == architecture.vocab_size


@pytest.mark.parametrize("words", [{}, {"greedy": True, "first_layer_soft": False}])
def test_a_router_that_megatron_does_not_compute_is_not_said(words):
    assert run_config(replace(MOE, routing=Routing(type="sample_top1", **words)), "bf16") is None


def test_every_word_is_one_that_its_provider_has(tmp_path):
    from tests.megatron_bridge.made import TEMPLATE

    known = yaml.safe_load(TEMPLATE.read_text())
    for architecture in (DENSE, MOE):
        written = yaml.safe_load(run_config(architecture, "fp16") or b"")
        for block in ("model", "checkpoint"):
            assert written[block].keys() <= known[block].keys()
