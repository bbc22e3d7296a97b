"""Each mix against what it must compute: plain float64 feed-forward layers, and plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.mix.average import Averaging
from megatron_btx.mix.btx import btx
from megatron_btx.mix.one_model import copy, fresh
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.mix.split import blend, split
from megatron_btx.mix.upcycle import upcycle
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.random_fill import Draw
from megatron_btx.weights.source import MemorySource, read_whole
from tests.weights.models import DENSE, dense

TOP2 = Routing(type="topk", moe_router_topk=2)
F64 = torch.float64
LAYER = "decoder.layers.2."
X = torch.randn(11, 32, generator=torch.Generator().manual_seed(3), dtype=F64)


def tensor(model, name: str) -> torch.Tensor:
    if isinstance(model, Checkpoint):
        return read_whole(model.source, name).double()
    return model.evaluate(name).double()


def ffn(fc1: torch.Tensor, fc2: torch.Tensor, x: torch.Tensor = X) -> torch.Tensor:
    gate, up = (x @ fc1.T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ fc2.T


def dense_ffn(model, x: torch.Tensor = X) -> torch.Tensor:
    return ffn(*(tensor(model, f"{LAYER}mlp.linear_fc{i}.weight") for i in (1, 2)), x)


def expert(plan, index: int, x: torch.Tensor = X) -> torch.Tensor:
    name = f"{LAYER}mlp.experts.{index}.linear_fc{{}}.weight"
    return ffn(tensor(plan, name.format(1)), tensor(plan, name.format(2)), x)


def moe(plan, gates: torch.Tensor) -> torch.Tensor:
    """Gates [tokens, experts]."""
    count = len(plan.architecture.experts)
    return sum(gates[:, [e]] * expert(plan, e) for e in range(count))


def gates_of(plan, k: int) -> torch.Tensor:
    """SoftMax(TopK(W x)): section 3.2."""
    logits = X @ tensor(plan, f"{LAYER}mlp.router.weight").T
    values, chosen = logits.topk(k)
    return torch.zeros_like(logits).scatter(1, chosen, values.softmax(-1))


def memory(plan, label: str) -> Checkpoint:
    """A plan's result as a checkpoint."""
    tensors = {name: plan.evaluate(name) for name in plan.targets}
    return Checkpoint(label, None, plan.architecture, MemorySource(tensors))


def test_btx_of_one_model_is_that_model_under_any_gates():
    models = [replace(dense("a", 1), label=label) for label in "abc"]
    plan = btx(models, routing=TOP2, dtype=F64)
    gates = torch.rand(11, 3, dtype=F64).softmax(-1)
    torch.testing.assert_close(moe(plan, gates), dense_ffn(models[0]), rtol=1e-12, atol=1e-12)
    rest = [n for n in plan.targets if ".experts." not in n and "router" not in n]
    for name in rest:
        own = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
        assert torch.equal(tensor(plan, name), tensor(models[0], own))


def test_forced_routing_is_that_models_ffn():
    models = [dense(label, i) for i, label in enumerate("abc")]
    plan = btx(models, routing=TOP2, dtype=torch.float32)
    for index, model in enumerate(models):
        assert torch.equal(expert(plan, index), dense_ffn(model))


def test_folded_norms_give_each_expert_its_own_input():
    models = [dense(label, i) for i, label in enumerate("abc")]
    plan = btx(models, routing=TOP2, dtype=F64, fold_norms=True)
    gain = tensor(plan, f"{LAYER}pre_mlp_layernorm.weight")
    for index, model in enumerate(models):
        own = tensor(model, f"{LAYER}mlp.linear_fc1.layer_norm_weight")
        got, want = expert(plan, index, X * gain), dense_ffn(model, X * own)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    zero = MemorySource(
        {
            name: torch.zeros(shape) if "layer_norm" in name else torch.ones(shape)
            for name, (shape, _) in models[0].source.tensors.items()
        }
    )
    dead = [replace(models[0], label=label, source=zero) for label in "ab"]
    with pytest.raises(UserError, match="an averaged gain is zero"):
        btx(dead, routing=TOP2, dtype=F64, fold_norms=True)


def test_upcycled_experts_are_copies():
    model = dense("a", 1)
    plan = upcycle(model, copies=3, routing=TOP2, dtype=torch.float32)
    for index in range(3):
        assert torch.equal(expert(plan, index), dense_ffn(model))
    noisy = upcycle(model, copies=2, routing=TOP2, dtype=F64, noise=0.01)
    name = f"{LAYER}mlp.experts.{{}}.linear_fc1.weight"
    noises = [
        tensor(noisy, name.format(e)) - tensor(model, f"{LAYER}mlp.linear_fc1.weight")
        for e in range(2)
    ]
    assert not torch.equal(*noises)
    for noise in noises:
        assert abs(noise.std() - 0.01) < 0.001


def test_drop_upcycling_redraws_the_same_units_of_gate_up_and_down():
    """A quarter of the units, others in each expert; moments of the matrix they belonged to."""
    large = replace(DENSE, model=replace(DENSE.model, ffn_hidden_size=400, num_layers=3))
    model = dense("a", 1, architecture=large)
    shift = {n: read_whole(model.source, n) * 0.3 + 0.1 for n in model.tensors}
    gate_rows = shift[f"{LAYER}mlp.linear_fc1.weight"][:400]
    gate_rows *= 2.0
    model = replace(model, source=MemorySource(shift))
    plan = upcycle(model, copies=3, routing=TOP2, dtype=torch.float32, drop_ratio=0.25)
    fc1, fc2 = (tensor(model, f"{LAYER}mlp.linear_fc{i}.weight") for i in (1, 2))
    chosen = []
    for index in range(3):
        name = f"{LAYER}mlp.experts.{index}.linear_fc{{}}.weight"
        new1, new2 = tensor(plan, name.format(1)), tensor(plan, name.format(2))
        same = [set((new == old).all(1).nonzero().flatten().tolist()) for new, old in (
            (new1[:400], fc1[:400]), (new1[400:], fc1[400:]), (new2.T, fc2.T))]  # fmt: skip
        assert len(same[0]) == 300
        assert same[0] == same[1] == same[2]
        gone = sorted(set(range(400)) - same[0])
        chosen.append(tuple(gone))
        rows = torch.tensor(gone)
        assert not (new1[:400][rows] == fc1[:400][rows]).any()
        for new, old in ((new1[:400][rows], fc1[:400]), (new1[400:][rows], fc1[400:]),
                         (new2[:, rows], fc2)):  # fmt: skip
            assert abs(new.mean() - old.mean()) < 4 * old.std() / new.numel() ** 0.5
            assert abs(new.std() / old.std() - 1) < 0.06
    assert len(set(chosen)) == 3
    other = plan.evaluate("decoder.layers.1.mlp.experts.0.linear_fc2.weight")
    before = read_whole(model.source, "decoder.layers.1.mlp.linear_fc2.weight")
    assert (other != before).any(0).nonzero().flatten().tolist() != list(chosen[0])
    both = sorted({*chosen[0]} & {*chosen[1]})
    first, second = (plan.evaluate(f"{LAYER}mlp.experts.{e}.linear_fc2.weight") for e in (0, 1))
    assert both
    assert not (first[:, both] == second[:, both]).any()
    cut = ((17, 490), (3, 9))
    name = f"{LAYER}mlp.experts.1.linear_fc1.weight"
    assert torch.equal(plan.evaluate(name, cut), plan.evaluate(name)[17:490, 3:9])


@pytest.mark.parametrize(("taken", "copies"), [(1, 3), (2, 3), (3, 3), (1, 2), (3, 4)])
def test_granular_upcycling_equals_the_dense_model_at_step_0(taken, copies):
    """Virtual groups: top-k of G rows a copy takes whole copies; the down matrix times G."""
    model, chunks = dense("a", 1), 4
    routing = Routing(type="topk", moe_router_topk=taken * chunks)
    plan = upcycle(
        model,
        copies=copies,
        num_chunks=chunks,
        routing=routing,
        dtype=F64,
        router=RouterInit(scale=0.5),
    )
    assert plan.architecture.model.ffn_hidden_size == 12
    got = moe(plan, gates_of(plan, taken * chunks))
    torch.testing.assert_close(got, dense_ffn(model), rtol=1e-11, atol=1e-11)
    cube = upcycle(
        model, copies=copies, num_chunks=chunks, routing=routing, dtype=F64, scale="cube_root"
    )
    bare = upcycle(
        model, copies=copies, num_chunks=chunks, routing=routing, dtype=F64, scale="none"
    )
    name = f"{LAYER}mlp.experts.5.linear_fc1.weight"
    factor = (copies * 16 / (taken * 4)) ** (1 / 3)
    torch.testing.assert_close(tensor(cube, name), tensor(bare, name) * factor)


def test_chunks_of_a_split_sum_to_the_ffn():
    models = [dense(label, i) for i, label in enumerate("ab")]
    plan = split(models, num_chunks=3, routing=TOP2, dtype=F64)
    assert plan.architecture.experts == ("a.0", "a.1", "a.2", "b.0", "b.1", "b.2")
    for index, model in enumerate(models):
        gates = torch.zeros(11, 6, dtype=F64)
        gates[:, 3 * index : 3 * index + 3] = 1 / 3
        torch.testing.assert_close(moe(plan, gates), dense_ffn(model), rtol=1e-11, atol=1e-11)
    bare = split(models, num_chunks=3, routing=TOP2, dtype=F64, scale="none")
    name = f"{LAYER}mlp.experts.4.linear_fc2.weight"
    want = tensor(models[1], f"{LAYER}mlp.linear_fc2.weight")[:, 16:32]
    assert torch.equal(tensor(bare, name), want)
    with pytest.raises(UserError, match="does not divide into 5 chunks"):
        split(models, num_chunks=5, routing=TOP2, dtype=F64)


def test_a_blend_of_a_number_of_models_that_does_not_divide_the_ffn():
    """The fix names what a blend has: it takes no ``num_chunks``."""
    models = [dense(label, at) for at, label in enumerate("abcde")]
    with pytest.raises(UserError) as caught:
        blend(models, routing=TOP2, dtype=F64)
    assert "mix another number of them" in str(caught.value)


def test_blended_experts():
    models = [replace(dense("a", 1), label=label) for label in "abc"]
    plan = blend(models, routing=Routing(type="soft"), dtype=F64)
    gates = torch.full((11, 3), 1 / 3, dtype=F64)
    torch.testing.assert_close(moe(plan, gates), dense_ffn(models[0]), rtol=1e-11, atol=1e-11)
    models = [dense(label, i) for i, label in enumerate("abc")]
    plan = blend(models, routing=TOP2, dtype=F64)
    got = tensor(plan, f"{LAYER}mlp.experts.1.linear_fc1.weight")
    rows = [tensor(m, f"{LAYER}mlp.linear_fc1.weight") for m in models]
    want = torch.cat([r[16:32] for r in rows] + [r[48 + 16 : 48 + 32] for r in rows])
    assert torch.equal(got, want)
    total = moe(plan, torch.ones(11, 3, dtype=F64))
    torch.testing.assert_close(total, sum(dense_ffn(m) for m in models), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("ratio", "units"), [(0.45, 22), (0.2, 10), (0.51, 24), (0.99, 48)])
def test_the_share_of_redrawn_units_is_rounded_to_the_nearest(ratio, units):
    """Of 48: 21.6, 9.6, 24.48 and 47.52 (arXiv 2502.19261, section 3: a share r of the units)."""
    model = dense("d", 0)
    plan = upcycle(model, copies=2, routing=TOP2, dtype=torch.float32, drop_ratio=ratio)
    old = read_whole(model.source, "decoder.layers.1.mlp.linear_fc2.weight")
    new = plan.evaluate("decoder.layers.1.mlp.experts.0.linear_fc2.weight")
    assert old.shape[1] == 48
    assert int((old != new).any(0).sum()) == units


def test_no_models_name_is_a_word_of_the_plan():
    """Its thresholds (TIES) and router rows lie under names that no model has."""
    rows = {
        f"decoder.layers.{layer}.mlp.router.weight/{place}": torch.full((32,), float(place))
        for layer in range(DENSE.model.num_layers)
        for place in range(3)
    }
    found = []
    for labels in (("seed", "b", "c"), ("seed", "thresholds", "centroids")):
        named = {key[:-1] + labels[int(key[-1])]: row for key, row in rows.items()}
        plan = btx(
            [dense(label, i) for i, label in enumerate(labels)],
            routing=TOP2,
            dtype=F64,
            averaging=Averaging(ties=0.5),
            router=RouterInit("centroids", centroids=MemorySource(named)),
        )
        found.append({name: plan.evaluate(name) for name in plan.targets})
    for name, tensor_ in found[0].items():
        assert torch.equal(tensor_, found[1][name]), name


def test_how_routers_begin():
    models = [dense(label, i) for i, label in enumerate("abcd")]

    def routers(kind, scale=0.5, seed=3):
        init = RouterInit(kind, scale, seed)
        plan = btx(models, routing=TOP2, dtype=F64, router=init)
        return torch.stack([
            plan.evaluate(f"decoder.layers.{i}.mlp.router.weight")
            for i in range(DENSE.model.num_layers)
        ])  # fmt: skip

    assert not routers("zeros").any()
    normal, uniform = routers("normal"), routers("uniform")
    assert abs(normal.std() - 0.5) < 0.05
    assert 0.45 < uniform.abs().max() <= 0.5
    assert abs(uniform.std() - 0.5 / 3**0.5) < 0.03
    name = f"{LAYER}mlp.router.weight"
    drawn = Draw("normal", 0.5, 3, name, (4, 32), F64)
    assert torch.equal(normal[2], drawn.evaluate(((0, 4), (0, 32)), lambda *_: torch.empty(0)))
    assert not torch.equal(routers("normal", seed=4), normal)


def test_a_fresh_model_begins_as_megatrons():
    """``init_method_std``, over sqrt(2 L) where a matrix writes into the residual stream."""
    model = replace(DENSE.model, add_qkv_bias=True, init_method_std=0.3)
    plan = fresh(replace(DENSE, model=model), seed=1, dtype=F64)
    for name in plan.targets:
        found = plan.evaluate(name)
        if "norm" in name or name.endswith("bias"):
            assert (found == (1 if "norm" in name else 0)).all()
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        want = 0.3 / (2 * model.num_layers) ** (0.5 * residual)
        assert abs(found.std() / want - 1) < 0.1


def test_models_that_differ_are_refused_all_at_once():
    other = replace(DENSE, model=replace(DENSE.model, rotary_base=1e6, layernorm_epsilon=1e-6))
    models = [
        dense("a", 1),
        dense("b", 2, architecture=other),
        replace(dense("c", 3), manifest={"tokenizer": {"type": "huggingface", "sha256": "2"}}),
        dense("a", 4),
    ]
    models[0] = replace(models[0], manifest={"tokenizer": {"type": "huggingface", "sha256": "1"}})
    with pytest.raises(UserError) as caught:
        btx(models, routing=TOP2, dtype=F64)
    text = str(caught.value)
    for found in (
        "rotary_base is 1000000.0",
        "layernorm_epsilon is 1e-06",
        "given twice",
        "sha256 is 2",
    ):
        assert found in text
    copied = memory(btx(models[:1], routing=TOP2, dtype=F64), "moe")
    with pytest.raises(UserError, match="already an MoE"):
        btx([copied], routing=TOP2, dtype=F64)


def test_a_copy_is_the_model():
    model = dense("a", 1)
    plan = copy(model, dtype=torch.bfloat16)
    for name in plan.targets:
        want = read_whole(model.source, name).bfloat16()
        assert torch.equal(plan.evaluate(name), want)


def test_plans_account_for_both_sides():
    from megatron_btx.weights.plan import Plan

    model = dense("a", 1)
    good = copy(model, dtype=torch.float32)
    name = f"{LAYER}mlp.linear_fc2.weight"
    targets = dict(good.targets)
    targets["stray"] = targets.pop(name)
    del targets["decoder.final_layernorm.weight"]
    with pytest.raises(UserError) as caught:
        Plan(good.architecture, targets, good.sources, good.expected)
    text = str(caught.value)
    for found in (
        f"{name} is missing",
        "stray is unexpected",
        "decoder.final_layernorm.weight is used by nothing",
    ):
        assert found in text
    assert good.hash == copy(dense("a", 2), dtype=torch.float32).hash
    assert good.hash != copy(model, dtype=torch.bfloat16).hash
    described = btx([model, dense("b", 2)], routing=TOP2, dtype=torch.float32).describe()
    assert "mlp.experts.1.linear_fc2.weight\n    = b:decoder.layers.*.mlp.linear_fc2" in described
