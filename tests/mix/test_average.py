"""Averages, DARE and TIES against plain float64 arithmetic over whole tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.mix.average import Averaging, Dare, average
from megatron_btx.mix.btx import btx
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.source import MemorySource, read_whole
from megatron_btx.weights.statistics import kth_largest
from tests.mix.test_mixes import F64, LAYER, TOP2, tensor
from tests.weights.models import DENSE, dense


def test_average_by_weights():
    models = [dense(label, i) for i, label in enumerate("abc")]
    name = f"{LAYER}self_attention.linear_qkv.weight"
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    got = btx(models, routing=TOP2, dtype=F64, averaging=Averaging(weights)).evaluate(name)
    want = sum(w * tensor(m, name) for w, m in zip((1, 2, 5), models, strict=True)) / 8
    torch.testing.assert_close(got, want, rtol=1e-15, atol=1e-15)
    flat = average(models, dtype=F64, averaging=Averaging(weights))
    assert torch.equal(flat.evaluate(name), got)
    assert flat.architecture == DENSE
    with pytest.raises(UserError, match="give each model of the mix one weight"):
        btx(models, routing=TOP2, dtype=F64, averaging=Averaging({"a": 1.0, "z": 1.0}))


def test_average_by_trained_tokens_and_by_groups():
    models = [dense(label, i) for i, label in enumerate(["a", "b", "seed"])]
    counted = [
        replace(model, manifest={"tokens": tokens})
        for model, tokens in zip(models, (300, 100, 9999), strict=True)
    ]
    groups = {"norms": {"a": 0.0, "b": 0.0, "seed": 1.0}}
    plan = btx(counted, routing=TOP2, dtype=F64, averaging=Averaging("tokens", groups=groups))
    name = f"{LAYER}self_attention.linear_qkv.weight"
    a, b = (tensor(model, name) for model in models[:2])
    torch.testing.assert_close(plan.evaluate(name), 0.75 * a + 0.25 * b, rtol=1e-15, atol=1e-15)
    norm = "decoder.final_layernorm.weight"
    assert torch.equal(plan.evaluate(norm), tensor(models[2], norm))
    with pytest.raises(UserError, match="b: does not say how many tokens"):
        btx(
            [counted[0], models[1], counted[2]],
            routing=TOP2,
            dtype=F64,
            averaging=Averaging("tokens"),
        )
    wrong = Averaging(groups={"ffn": {"a": 1.0}, "head": {"a": 0.0, "b": 0.0, "seed": 0.0}})
    with pytest.raises(UserError) as caught:
        btx(counted, routing=TOP2, dtype=F64, averaging=wrong)
    for found in ("there is no group ffn", "weights for a;", "head: the weights do not sum"):
        assert found in str(caught.value)


GROUPS = {
    "embedding.word_embeddings.weight": "embeddings",
    "self_attention.linear_qkv.layer_norm_weight": "norms",
    "self_attention.q_layernorm.weight": "norms",
    "mlp.linear_fc1.layer_norm_weight": "norms",
    "decoder.final_layernorm.weight": "norms",
    "self_attention.linear_qkv.weight": "attention",
    "self_attention.linear_qkv.bias": "attention",
    "self_attention.linear_proj.weight": "attention",
    "output_layer.weight": "head",
}


def test_each_group_has_its_own_weights():
    model = replace(DENSE.model, add_qkv_bias=True, qk_layernorm=True)
    models = [dense(x, i, architecture=replace(DENSE, model=model)) for i, x in enumerate("ab")]
    shares = {"embeddings": 0.9, "attention": 0.7, "norms": 0.2, "head": 0.4}
    groups = {group: {"a": share, "b": 1 - share} for group, share in shares.items()}
    plan = btx(models, routing=TOP2, dtype=F64, averaging=Averaging(groups=groups))
    for end, group in GROUPS.items():
        name = end if end in plan.targets or "fc1" not in end else "pre_mlp_layernorm.weight"
        name = name if name in plan.targets else f"{LAYER}{name}"
        a, b = (tensor(m, end if end in m.tensors else f"{LAYER}{end}") for m in models)
        want = shares[group] * a + (1 - shares[group]) * b
        torch.testing.assert_close(plan.evaluate(name), want, rtol=1e-14, atol=1e-14)


def test_the_average_of_copies_is_the_model():
    models = [replace(dense("a", 1), label=label) for label in "abc"]
    plan = average(models, dtype=torch.float32)
    for name in plan.targets:
        assert torch.equal(plan.evaluate(name), read_whole(models[0].source, name))


def test_dare_keeps_a_share_of_the_differences():
    """Expectation: the mean. Every kept difference counts ``1 / (1 - drop)`` times."""
    models = [dense(label, i) for i, label in enumerate(["seed", "b"])]
    name = "embedding.word_embeddings.weight"
    averaging = Averaging(dare=Dare("seed", drop=0.75, seed=9))
    got = average(models, dtype=F64, averaging=averaging).evaluate(name)
    base, other = (tensor(model, name) for model in models)
    share = (got - base) / (other - base)
    assert set(share.mul(1e6).round().div(1e6).unique().tolist()) == {0.0, 2.0}
    assert abs((share > 1).double().mean() - 0.25) < 0.03
    none = average(models, dtype=F64, averaging=Averaging(dare=Dare("seed", drop=0.0)))
    torch.testing.assert_close(none.evaluate(name), (base + other) / 2, rtol=1e-12, atol=1e-12)
    with pytest.raises(UserError, match="no model x"):
        average(models, dtype=F64, averaging=Averaging(dare=Dare("x")))
    twins = [*models, replace(models[1], label="c")]  # each drops what it does by itself
    got = average(twins, dtype=F64, averaging=averaging).evaluate(name)
    share = ((got - base) / (other - base)).mul(3 / 4).round()
    counts = [(share == times).double().mean() for times in (0, 1, 2)]
    for found, wanted in zip(counts, (9 / 16, 6 / 16, 1 / 16), strict=True):
        assert abs(found - wanted) < 0.03


def test_ties_trims_elects_a_sign_and_averages_what_agrees():
    """Against the three steps of arXiv 2306.01708 over whole tensors."""
    models = [dense(label, i) for i, label in enumerate(["a", "seed", "b", "c"])]
    got = average(models, dtype=F64, averaging=Averaging(ties=0.3))
    for name in got.targets:
        base = tensor(models[1], name)
        moved = [tensor(models[i], name) - base for i in (0, 2, 3)]
        count = round(0.3 * base.numel())
        kept = [d * (d.abs() >= d.abs().flatten().topk(count).values[-1]) for d in moved]
        sign = sum(kept).sign()
        agree = [d.sign() * sign > 0 for d in kept]
        total = sum(d * a for d, a in zip(kept, agree, strict=True))
        mean = total / sum(a.double() for a in agree).clamp(min=1)
        torch.testing.assert_close(got.evaluate(name), base + mean, rtol=1e-12, atol=1e-12)
    weights = {"a": 3.0, "seed": 1.0, "b": 1.0, "c": 0.5}
    got = average(models, dtype=F64, averaging=Averaging(weights, ties=0.3))
    each = [weights[label] for label in "abc"]
    name = f"{LAYER}mlp.linear_fc2.weight"
    base = tensor(models[1], name)
    moved = [tensor(models[i], name) - base for i in (0, 2, 3)]
    count = round(0.3 * base.numel())
    kept = [d * (d.abs() >= d.abs().flatten().topk(count).values[-1]) for d in moved]
    sign = sum(w * d for w, d in zip(each, kept, strict=True)).sign()
    agree = [(d.sign() * sign > 0) * w for d, w in zip(kept, each, strict=True)]
    mean = sum(d * a for d, a in zip(kept, agree, strict=True)) / sum(agree).clamp(min=1e-9)
    torch.testing.assert_close(got.evaluate(name), base + mean, rtol=1e-12, atol=1e-12)
    copies = [replace(models[0], label=label) for label in ("seed", "x", "y")]
    same = average(copies, dtype=torch.float32, averaging=Averaging(ties=0.3))
    for name in same.targets:
        assert torch.equal(same.evaluate(name), read_whole(models[0].source, name))
    alone = average(models[1:2], dtype=torch.float32, averaging=Averaging(ties=0.3))
    for name in alone.targets:
        assert torch.equal(alone.evaluate(name), read_whole(models[1].source, name))
    with pytest.raises(UserError, match="no model seed"):
        average(models[2:], dtype=F64, averaging=Averaging(ties=0.3))


@pytest.mark.parametrize("k", [1, 2, 700, 1999, 2000])
def test_the_kth_largest_magnitude_is_exact(k):
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(k), dtype=F64)
    values[:3] = 0.25  # equal ones
    source = MemorySource({"x": values})
    found = kth_largest(
        Take("m", "x", (40, 50), F64), lambda _, name, box: source.read(name, box), k
    )
    assert found == values.abs().flatten().sort(descending=True).values[k - 1]
