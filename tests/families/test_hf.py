"""What is read of a Hugging Face directory, how it is laid out, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_btx.errors import UserError
from megatron_btx.families import open_hf
from megatron_btx.families.export import write_hf
from megatron_btx.families.hf import read_config
from megatron_btx.families.write_megatron_lm_args import command_line
from megatron_btx.mix.one_model import copy
from megatron_btx.weights.box import whole
from megatron_btx.weights.source import read_whole
from tests.families.made import LLAMA3, make

pytest.importorskip("transformers")


def test_canonical_layout_of_attention_and_gate(tmp_path):
    """Written out by hand once: q of group g, then its k and v; gate above up."""
    model = make("qwen2", tmp_path / "in").model.layers[1]
    opened = open_hf(tmp_path / "in", "model")
    attention = model.self_attn
    for kind in ("weight", "bias"):
        qkv = read_whole(opened.source, f"decoder.layers.1.self_attention.linear_qkv.{kind}")
        q, k, v = (getattr(attention, f"{each}_proj").get_parameter(kind) for each in "qkv")
        want = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
        assert torch.equal(qkv, want)
    fc1 = read_whole(opened.source, "decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(fc1, torch.cat([model.mlp.gate_proj.weight, model.mlp.up_proj.weight]))


def test_plans_between_hugging_face_names_are_simple(tmp_path):
    """Joining and splitting cancel: nothing is interleaved only to be taken apart again."""
    from megatron_btx.families.llama import QWEN2
    from megatron_btx.weights.ops import mean
    from megatron_btx.weights.safetensors import SafetensorsSource
    from megatron_btx.weights.source import take_all

    make("qwen2", tmp_path / "in")
    architecture = open_hf(tmp_path / "in", "a").architecture
    source = SafetensorsSource(tmp_path / "in")
    models = [QWEN2.table.to_canonical(take_all(n, source), architecture) for n in "ab"]
    mixed = {name: mean([m[name] for m in models], torch.float32) for name in models[0]}
    back = QWEN2.table.to_hf(mixed, architecture)
    assert back.keys() == source.tensors.keys()
    for name, expression in back.items():
        assert str(expression) == f"(a:{name} + b:{name})/2"


def test_the_index_of_many_files(tmp_path):
    make("llama", tmp_path / "in")
    write_hf(
        copy(open_hf(tmp_path / "in", "m"), dtype=torch.float32), tmp_path / "out", shard=20_000
    )
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / "out" / file).values()
    )


BAD = [
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "of type yarn"),
    ("llama", {"rope_parameters": {"rope_type": ""}}, "rope_scaling of type "),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type dynamic"),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
        "low_freq_factor of rope_scaling is not 1.0",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}},
        "original_max_position_embeddings of rope_scaling is not 8192",
    ),
    (
        "llama",
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor of rope_scaling is not 1.0",
    ),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "other positions in other layers"),
    ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale is 0.0625: a field that this converter does"),
    ("llama", {"quantization_config": {"bits": 4}}, "the weights are quantised"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers is missing"),
    ("llama", {"num_hidden_layers": 5}, "model.layers.4.mlp.down_proj.weight is missing"),
    ("llama", {"num_hidden_layers": 3}, "model.layers.3.mlp.down_proj.weight is unexpected"),
    ("llama", {"vocab_size": 71}, "has shape (70, 32), not (71, 32)"),
    ("llama", {"num_key_value_heads": 2}, "k_proj.weight has shape (32, 32), not (16, 32)"),
    ("mistral", {"num_key_value_heads": None}, "k_proj.weight has shape (16, 32), not (32, 32)"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is not on"),
    ("qwen3", {"head_dim": None}, "head_dim is missing"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("mixtral", {"btx_experts": ["a"]}, "btx_experts names 1 experts of 4"),
    ("qwen2 moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ("qwen3 moe", {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    ("qwen3 moe", {"num_experts": 3}, "num_experts and num_local_experts differ"),
    (
        "qwen2 moe",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
        "use_sliding_window is on without layer_types",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The directories of :data:`BAD`, made once."""
    names = {name for name, _, _ in BAD}
    places = {name: tmp_path_factory.mktemp("model") for name in names}
    for name, place in places.items():
        make(name, place)
    return places


MIXED = [
    ("llama", "q_proj", torch.float32),
    ("llama", "k_proj", torch.float16),
    ("mixtral", "experts.0.w1", torch.float32),
    ("qwen3 moe", "gate_proj", torch.float32),
]


@pytest.mark.parametrize(("name", "part", "dtype"), MIXED)
def test_parts_of_several_dtypes_are_rounded_once(models, tmp_path, name, part, dtype):
    """bf16 but for some parts of what Megatron fuses: in fp32 as they are, and in bf16 as if each
    had been rounded before they were joined."""
    tensors = load_file(models[name] / "model.safetensors")
    tensors = {key: t.to(dtype if part in key else torch.bfloat16) for key, t in tensors.items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype, torch.bfloat16}

    def opened(case, to):
        (tmp_path / case).mkdir()
        (tmp_path / case / "config.json").symlink_to(models[name] / "config.json")
        cast = {key: t.to(to) if to else t for key, t in tensors.items()}
        save_file(cast, tmp_path / case / "model.safetensors")
        return open_hf(tmp_path / case, "m")

    mixed = opened("mixed", None)
    for to in (torch.float32, torch.bfloat16):
        plan, oracle = copy(mixed, dtype=to), copy(opened(str(to), to), dtype=to)
        for key, target in plan.targets.items():
            box, stored = whole(target.shape), plan.resolved(target)
            assert torch.equal(plan.evaluate(key), oracle.evaluate(key)), key
            assert torch.equal(stored.evaluate(box, plan.read_stored), oracle.evaluate(key)), key


@pytest.mark.parametrize(("name", "change", "found"), BAD)
def test_what_we_would_compute_wrongly_is_refused(models, tmp_path, name, change, found):
    (tmp_path / "model.safetensors").symlink_to(models[name] / "model.safetensors")
    config = json.loads((models[name] / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        open_hf(tmp_path, "model")
    assert found in str(caught.value)


def test_harmless_fields_are_let_through(models, tmp_path):
    (tmp_path / "model.safetensors").symlink_to(models["llama"] / "model.safetensors")
    config = json.loads((models["llama"] / "config.json").read_text())
    more = {"use_cache": False, "pretraining_tp": 2, "logit_scale": None, "use_mrope": False}
    (tmp_path / "config.json").write_text(json.dumps(config | more))
    assert open_hf(tmp_path, "model").architecture == open_hf(models["llama"], "m").architecture


def test_every_wrong_tensor_is_named_at_once(tmp_path):
    make("llama", tmp_path / "in")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["lm_head.weight"] = torch.zeros(70, 31)
    save_file(tensors, path)
    with pytest.raises(UserError) as caught:
        open_hf(tmp_path / "in", "model")
    for name in ("model.norm.weight is", "0.self_attn.k_proj", "q_proj.bias", "(70, 31)"):
        assert name in str(caught.value)


def test_the_arguments_of_megatron_lm_name_its_conversion(models):
    said = command_line(open_hf(models["llama"], "m"), 1)
    assert f"mkdir load && btx convert hf-to-megatron {models['llama']} load/release\n" in said


def test_pickles_are_refused(tmp_path):
    make("llama", tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        open_hf(tmp_path / "in", "model")


def test_granites_attention_multiplier_of_null_is_no_multiplier(tmp_path):
    """transformers hands null on to ``scaled_dot_product_attention``, and takes 1 where it is
    absent; both logits were compared."""
    make("granite moe", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"attention_multiplier": None}))
    assert read_config(tmp_path)[1].model.softmax_scale is None
    del config["attention_multiplier"]
    path.write_text(json.dumps(config))
    assert read_config(tmp_path)[1].model.softmax_scale == 1
