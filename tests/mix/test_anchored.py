"""Anchored branches: what one begins with, and what becomes of several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.anchored import branch, own_expert
from megatron_btx.mix.average import Averaging
from megatron_btx.mix.btx import btx
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.recipe.names import canonical_tensors, group_of
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.manifest import FORMAT, MANIFEST
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import MemorySource
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.mix.commands import btx as btx_command
from tests.mix.test_mixes import dense_ffn, ffn, memory, tensor
from tests.weights.models import dense

TOP2 = Routing(type="topk", moe_router_topk=2)
F32 = torch.float32
SEED = replace(dense("seed", 1), label="seed")
LAYER = "decoder.layers.2."


def trained(name: str, number: int, learned: tuple[str, ...] = ("ffn",)) -> Checkpoint:
    """A branch after a training in which, besides its own expert, the routers and the groups
    ``learned`` have changed."""
    generator = torch.Generator().manual_seed(number)
    begun = memory(branch(SEED, name, routing=TOP2, dtype=F32), name)
    tensors = {}
    for key in begun.source.tensors:
        changes = ".experts.0." in key or "router" in key
        changes = changes or (group_of(key) in learned and ".experts." not in key)
        noise = torch.randn(begun.source.tensors[key][0], generator=generator) * 0.1
        tensors[key] = tensor(begun, key).float() + noise * changes
    return replace(begun, source=MemorySource(tensors), manifest={"anchor": "seed"})


def test_a_branch_begins_as_the_seed() -> None:
    """Both experts are the seed's; every branch has the same row for the anchor and one of its
    own."""
    code, math = (branch(SEED, name, routing=TOP2, dtype=F32) for name in ("code", "math"))
    assert code.architecture.experts == ("code", "seed")
    assert code.architecture.routing is not None
    assert code.architecture.routing.balance_loss_coeff == 0
    for expert in (0, 1):
        for matrix in ("linear_fc1", "linear_fc2"):
            found = tensor(code, f"{LAYER}mlp.experts.{expert}.{matrix}.weight")
            assert torch.equal(found, tensor(SEED, f"{LAYER}mlp.{matrix}.weight"))
    here, there = (tensor(plan, f"{LAYER}mlp.router.weight") for plan in (code, math))
    assert torch.equal(here[1], there[1])
    assert not torch.equal(here[0], there[0])
    proj = f"{LAYER}self_attention.linear_proj.weight"
    assert torch.equal(tensor(code, proj), tensor(SEED, proj))


def test_concatenated() -> None:
    """Experts and their rows are the branches'; what was frozen is the seed's, bit for bit; what
    learned is the branches' mean, in which the seed does not count."""
    branches = [trained("code", 5, ("embeddings",)), trained("math", 6, ("embeddings",))]
    plan = btx([*branches, SEED], routing=TOP2, dtype=F32, router=RouterInit("branches"))
    assert plan.architecture.experts == ("code", "math", "seed")
    for expert, model in enumerate(branches):
        for matrix in ("linear_fc1", "linear_fc2"):
            wanted = tensor(model, f"{LAYER}mlp.experts.0.{matrix}.weight")
            assert torch.equal(tensor(plan, f"{LAYER}mlp.experts.{expert}.{matrix}.weight"), wanted)
    found = ffn(*(tensor(plan, f"{LAYER}mlp.experts.2.linear_fc{i}.weight") for i in (1, 2)))
    assert torch.equal(found, dense_ffn(SEED))
    rows = [tensor(model, f"{LAYER}mlp.router.weight") for model in branches]
    router = tensor(plan, f"{LAYER}mlp.router.weight")
    assert torch.equal(router[:2], torch.stack([rows[0][0], rows[1][0]]))
    assert torch.equal(router[2], ((rows[0][1] + rows[1][1]) / 2).float().double())
    for name in canonical_tensors(SEED.architecture):
        if group_of(name) in ("attention", "norms", "head"):
            there = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            assert torch.equal(tensor(plan, there), tensor(SEED, name)), name
    embedding = "embedding.word_embeddings.weight"
    total = sum(tensor(model, embedding) for model in branches)
    assert torch.equal(tensor(plan, embedding), (total / 2).float().double())


def test_forced_it_is_the_branch() -> None:
    """Where all shared layers were frozen: the model of one expert is the branch's own."""
    branches = [trained("code", 5), trained("math", 6)]
    plan = btx([*branches, SEED], routing=TOP2, dtype=F32, router=RouterInit("branches"))
    alone, own = forced(plan, 1), own_expert(branches[1])
    for name in alone.targets:
        assert torch.equal(tensor(alone, name), tensor(own, name)), name


def test_weights_routers_and_others() -> None:
    """All that a mix can do with dense models it does with branches."""
    branches = [trained("code", 5, ("head",)), trained("math", 6, ("head",))]
    weighed = Averaging(weights={"code": 3.0, "math": 1.0, "seed": 0.0})
    plan = btx([*branches, SEED], routing=TOP2, dtype=F32, averaging=weighed)
    head = "output_layer.weight"
    code, math = (tensor(model, head) for model in branches)
    assert torch.equal(tensor(plan, head), ((3 * code + math) / 4).float().double())
    drawn = btx([dense("code", 2), dense("math", 3), SEED], routing=TOP2, dtype=F32)
    router = f"{LAYER}mlp.router.weight"
    assert torch.equal(tensor(plan, router), tensor(drawn, router))
    kept = btx([*branches, SEED], routing=TOP2, dtype=F32, averaging=Averaging(ties=1.0))
    moved = torch.stack([code - tensor(SEED, head), math - tensor(SEED, head)])
    sign = moved.sum(0).sign()
    agree = moved * (moved.sign() == sign)
    mean = agree.sum(0) / (agree != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(tensor(kept, head), tensor(SEED, head) + mean, rtol=0, atol=1e-6)


def test_another_moe_is_refused() -> None:
    """Only a checkpoint that says so is a branch."""
    other = replace(trained("code", 5), manifest={})
    with pytest.raises(UserErrors, match="already an MoE"):
        btx([other, SEED], routing=TOP2, dtype=F32)


def _save(model: Checkpoint, path: Path) -> str:
    """As a step directory that says what it is."""
    plan = copy(model, dtype=F32)
    said = {"format": FORMAT, "layout": {}, **plan.architecture.to_json(), **model.manifest}
    write_torch_dist(plan, path, files=lambda: {MANIFEST: json.dumps(said).encode()})
    return f"{model.label}={path}"


def test_the_command_and_its_verification(tmp_path: Path) -> None:
    """Branches from the disk are mixed in several ways, and one is exchanged; plain loops agree."""
    branches = [trained("code", 5, ("head",)), trained("math", 6, ("head",))]
    sources = [_save(model, tmp_path / model.label) for model in (*branches, SEED)]
    for number, words in enumerate(
        (
            ["--router-init", "branches"],
            ["--ties", "0.3"],
            ["--average", "code=3", "math=1", "seed=0"],
        )
    ):
        out = tmp_path / f"moe-{number}"
        assert btx_command("mix", "--sources", *sources, *words, "--out", out)[0] == 0
        assert btx_command("verify", out)[0] == 0
    code, said = btx_command("drift", "--sources", *sources)
    assert code == 0
    assert "code" in said
    other = _save(replace(trained("new", 8), label="new"), tmp_path / "new")
    for words in (["--method", "replace", "--expert", "code"], ["--method", "append"]):
        out = tmp_path / words[1]
        given = ["--sources", f"moe={tmp_path / 'moe-0'}", other]
        assert btx_command("mix", *given, *words, "--out", out)[0] == 0
        assert btx_command("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--method", "replace", "--expert", "none"], "its experts are a, b, c"),
        (["--method", "replace"], "has no expert new"),
        (["--method", "replace", "--dare", "0.5"], "has no meaning for method replace"),
    ],
)
def test_the_command_refuses(tmp_path: Path, words: list[str], found: str) -> None:
    models = [dense(label, number) for number, label in enumerate("abc")]
    moe = memory(btx(models, routing=TOP2, dtype=F32), "moe")
    sources = [_save(one, tmp_path / one.label) for one in (moe, dense("new", 9))]
    with pytest.raises(UserError, match=found):
        btx_command("mix", "--sources", *sources, *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
