"""Routers from centroids: the means against ``transformers``, the rows against plain loops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from megatron_btx.errors import UserError
from megatron_btx.evaluate.model_spec import parse
from megatron_btx.evaluate.packed_text import PackedText
from megatron_btx.families import open_hf
from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.recipe.schema import Layout
from tests.engine.test_layouts import PP2, TP2
from tests.evaluate.made import TEXTS, moe, random_model, tokenizer, write
from tests.mix.commands import btx
from tests.mix.ranks_side import measure_centroids

DP2 = Layout(data_parallel_size=2)
NAMES = ("a", "b", "c", "d")
DATA = {"a": "x", "b": "y", "c": "x", "d": "y"}
LENGTH = 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An MoE, its dense models, and the domains' text."""
    root = tmp_path_factory.mktemp("centroids")
    write(moe(tokenizer()), root / "moe", tokenizer())
    for seed, name in enumerate(NAMES):
        write(random_model(tokenizer(), seed), root / name, tokenizer())
    for name, text in DATA.items():
        part = TEXTS[text][:9] if name in "ab" else TEXTS[text][3:]
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in part))
    return root


@pytest.fixture(scope="module")
def inputs(made):
    """By ``transformers``: what the FFNs of each forced expert are given, [layers, tokens, H], of
    every whole sequence."""
    import transformers

    plan = copy(open_hf(made / "moe", "moe"), dtype=torch.float32)
    spoken = tokenizer()
    found = {}
    for expert, name in enumerate(NAMES):
        write_hf(forced(plan, expert), made / f"forced-{name}")
        model = transformers.AutoModelForCausalLM.from_pretrained(made / f"forced-{name}").eval()
        lines = (made / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        text = PackedText(texts, spoken, LENGTH, start_id=spoken.eos_id)
        rows = torch.stack([text[i]["tokens"] for i in range(text.size.tokens // LENGTH)])
        seen: list[torch.Tensor] = []

        def keep(_module, _inputs, output, seen=seen):
            seen.append(output.double())

        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(keep)
        with torch.no_grad():
            model(rows)
        found[name] = torch.stack(seen).flatten(1, 2)
    return found


@pytest.mark.parametrize("layout", [Layout(), DP2, TP2, PP2], ids=["one", "dp2", "tp2", "pp2"])
def test_centroids_are_the_means_of_what_the_experts_are_given(
    ranks, made, inputs, tmp_path, layout
):
    seen = inputs
    out = tmp_path / "centroids.safetensors"
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    results = ranks.run(measure_centroids, layout.world_size, subject, layout, files, out, LENGTH)
    rows = load_file(out)
    means = torch.stack([seen[name].mean(1) for name in NAMES], 1)
    for layer in range(2):
        centred = means[layer] - means[layer].mean(0)
        every = torch.cat([seen[name][layer] for name in NAMES])
        logits = every @ centred.T
        spread = logits.var(1, correction=0).mean().sqrt()
        for expert, name in enumerate(NAMES):
            got = rows[f"decoder.layers.{layer}.mlp.router.weight/{name}"].double()
            torch.testing.assert_close(got, centred[expert] * 0.7 / spread, rtol=2e-4, atol=1e-5)
    own = {
        name: sum((seen[name][k] @ (means[k] - means[k].mean(0)).T).argmax(1).eq(e).double().mean()
                  for k in range(2)).item() / 2 for e, name in enumerate(NAMES)}  # fmt: skip
    assert results[0]["own"] == pytest.approx(own, abs=0.02)


def test_a_mix_takes_them_and_is_verified(ranks, made, tmp_path):
    out = tmp_path / "c.safetensors"
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    ranks.run(measure_centroids, 1, subject, Layout(), files, out, LENGTH)
    words = ["mix", "--sources", *(made / name for name in NAMES), "--router-init", "centroids"]
    btx(*words, "--centroids", out, "--out", tmp_path / "mixed")
    assert btx("verify", tmp_path / "mixed")[0] == 0
    gate = load_file(tmp_path / "mixed" / "model.safetensors")
    got = gate["model.layers.1.block_sparse_moe.gate.weight"]
    rows = load_file(out)
    for expert, name in enumerate(NAMES):
        assert torch.equal(got[expert], rows[f"decoder.layers.1.mlp.router.weight/{name}"])
    lineage = json.loads((tmp_path / "mixed" / "mix.json").read_text())
    assert len(lineage["centroids_sha256"]) == 64
    three = ["mix", "--sources", *(made / name for name in "abc"), "--router-init", "centroids"]
    with pytest.raises(UserError, match="router.weight/d is used by nothing"):
        btx(*three, "--centroids", out, "--out", tmp_path / "no")
    with pytest.raises(UserError, match="goes with router_init"):
        btx(*words, "--out", tmp_path / "no")
    split = ["--method", "split", "--num-chunks", 2, "--centroids", out, "--out", tmp_path / "no"]
    with pytest.raises(UserError, match="--centroids: has no meaning for method split"):
        btx(*words, *split)
    assert not (tmp_path / "no").exists()


def test_experts_without_text_are_named_at_once(ranks, made, tmp_path):
    (subject,) = parse([str(made / "moe")])
    files = {"a": [str(made / "a.jsonl")], "z": [str(made / "a.jsonl")]}
    out = tmp_path / "c.safetensors"
    found = ranks.run(measure_centroids, 1, subject, Layout(), files, out, LENGTH)[0]
    for words in ("no text for the expert b", "no text for the expert c", "has no expert z"):
        assert words in found["error"]
    assert not out.exists()


def test_an_expert_alone_is_a_dense_model():
    model = random_model(tokenizer(), 2)
    plan = forced(moe(tokenizer()), 2)
    assert plan.architecture == replace(model.architecture, experts=(), routing=None)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(plan.evaluate(name), copy(model, dtype=torch.float32).evaluate(name))
