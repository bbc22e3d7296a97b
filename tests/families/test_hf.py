"""Real ``transformers`` models through canonical names and back, and against Megatron's logits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_btx.errors import UserError
from megatron_btx.families import open_hf
from megatron_btx.families.export import export_hf, write_hf
from megatron_btx.mix.copy import copy
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.source import read_whole
from tests.engine.test_layouts import TP2, TP2_EP2
from tests.families.ranks_side import logits, save_moe

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("Llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "head_dim": 8}),
}


def make(name: str, directory, dtype=torch.float32, theta=5e5):
    family, more = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **(SHAPE | more), rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for parameter in model.parameters():  # norms too: ones would hide a swap
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_the_same_model(tmp_path, name, dtype):
    original = make(name, tmp_path / "in", dtype)
    opened = open_hf(tmp_path / "in", "model")
    write_hf(copy(opened, dtype=dtype), tmp_path / "out", shard=20_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert type(again) is type(original)
    want, got = original.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
    tokens = torch.arange(40).reshape(2, 20)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=dtype)
    torch.testing.assert_close(again(tokens).logits, original(tokens).logits)
    for key in (*SHAPE, "rope_parameters", "hidden_act", "tie_word_embeddings", "head_dim"):
        if key == "head_dim" and name == "mixtral":
            continue
        assert getattr(again.config, key) == getattr(original.config, key), key
    assert open_hf(tmp_path / "out", "model").architecture == opened.architecture
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for file in files for tensor in load_file(tmp_path / "out" / file).values()
    )


def test_canonical_layout_of_attention_and_gate(tmp_path):
    """Written out by hand once: q of group g, then its k and v; gate above up."""
    model = make("llama", tmp_path / "in").model.layers[1]
    opened = open_hf(tmp_path / "in", "model")
    qkv = read_whole(opened.source, "decoder.layers.1.self_attention.linear_qkv.weight")
    attention = model.self_attn
    q, k, v = attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight
    want = torch.cat([q[:16], k[:8], v[:8], q[16:], k[8:], v[8:]])
    assert torch.equal(qkv, want)
    fc1 = read_whole(opened.source, "decoder.layers.1.mlp.linear_fc1.weight")
    assert torch.equal(fc1, torch.cat([model.mlp.gate_proj.weight, model.mlp.up_proj.weight]))


def test_plans_between_hugging_face_names_are_simple(tmp_path):
    """Joining and splitting cancel: nothing is interleaved only to be taken apart again."""
    from megatron_btx.families.hf import LLAMA
    from megatron_btx.weights import SafetensorsSource
    from megatron_btx.weights.build import mean
    from megatron_btx.weights.source import take_all

    make("llama", tmp_path / "in")
    architecture = open_hf(tmp_path / "in", "a").architecture
    source = SafetensorsSource(tmp_path / "in")
    models = [LLAMA.table.to_canonical(take_all(n, source), architecture) for n in "ab"]
    mixed = {name: mean([m[name] for m in models], torch.float32) for name in models[0]}
    back = LLAMA.table.to_hf(mixed, architecture)
    assert back.keys() == source.tensors.keys()
    for name, expression in back.items():
        assert str(expression) == f"(a:{name} + b:{name})/2"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling is"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": 3}, "model.layers.2.mlp.down_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.mlp.down_proj.weight is unexpected"),
        ({"vocab_size": 71}, "has shape (70, 32), not (71, 32)"),
        ({"num_key_value_heads": 4}, "k_proj.weight has shape (16, 32), not (32, 32)"),
    ],
)
def test_what_we_would_compute_wrongly_is_refused(tmp_path, change, found):
    make("llama", tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        open_hf(tmp_path / "in", "model")
    assert found in str(caught.value)


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


def test_pickles_are_refused(tmp_path):
    make("llama", tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle"):
        open_hf(tmp_path / "in", "model")


@pytest.mark.parametrize("name", ["llama", "llama, tied", "mixtral"])
def test_megatron_computes_the_same_logits(ranks, tmp_path, name):
    model = make(name, tmp_path / "hf")
    tokens = torch.randint(0, 70, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(tokens).logits
    got = ranks.run(logits, 2, tmp_path / "hf", TP2, tokens)[0]
    assert (got - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", ["topk", "soft"])
def test_an_exported_moe_computes_megatrons_logits(ranks, tmp_path, kind):
    """Megatron, TP2 x EP2 -> torch_dist -> Hugging Face -> transformers."""
    routing = Routing(type=kind, moe_router_topk=2)
    tokens = torch.randint(0, 120, (2, 16), generator=torch.Generator().manual_seed(1))
    results = ranks.run(save_moe, 2, tmp_path / "moe", TP2_EP2, routing, tokens)
    export_hf(tmp_path / "moe", tmp_path / "hf", bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model) is transformers.MixtralForCausalLM
    assert model.config.num_experts_per_tok == (2 if kind == "topk" else 4)
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        got = model(tokens).logits
    assert (got - results[0]).abs().max() < 1e-4 * got.abs().max()


@pytest.mark.parametrize("kind", ["switch", "sample_top1"])
def test_routing_that_mixtral_lacks_is_refused(ranks, tmp_path, kind):
    make("mixtral", tmp_path / "in")
    opened = open_hf(tmp_path / "in", "model")
    changed = replace(opened.architecture, routing=Routing(type=kind))
    plan = replace(copy(opened, dtype=torch.float32), architecture=changed)
    with pytest.raises(UserError, match=f"cannot express routing type {kind}"):
        write_hf(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
