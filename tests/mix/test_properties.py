"""Random models in random mixes: a plan covers both sides, and a slice of it is that slice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_btx.errors import UserError
from megatron_btx.mix.average import Averaging, Dare, average
from megatron_btx.mix.edit_experts import append, drop
from megatron_btx.mix.plans import mix_plan
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Mix, Model, Routing
from megatron_btx.weights.execute import Execution
from megatron_btx.weights.ops import takes
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.source import MemorySource, read_whole
from tests.mix.test_mixes import memory
from tests.weights.models import dense
from tests.weights.test_expression import boxes

FEW = settings(max_examples=30, suppress_health_check=list(HealthCheck))
METHODS = ["btx", "split", "blend", "upcycle", "average", "append", "drop"]


@st.composite
def architectures(draw) -> Architecture:
    groups = draw(st.sampled_from([1, 2, 3]))
    return Architecture(
        model=Model(
            num_layers=draw(st.integers(1, 3)),
            hidden_size=draw(st.integers(1, 9)),
            ffn_hidden_size=6 * draw(st.integers(1, 3)),
            num_attention_heads=groups * draw(st.integers(1, 3)),
            num_query_groups=groups,
            kv_channels=2 * draw(st.integers(1, 2)),
            untie_embeddings_and_output_weights=draw(st.booleans()),
            add_qkv_bias=draw(st.booleans()),
            qk_layernorm=draw(st.booleans()),
        ),
        vocab_size=draw(st.integers(1, 20)),
    )


@st.composite
def plans(draw) -> Plan:
    """Any method, any of its options, any model."""
    architecture = draw(architectures())
    labels = draw(st.sampled_from([("seed",), ("a", "seed"), ("a", "b", "seed")]))
    method = draw(st.sampled_from(METHODS))
    models = [dense(label, i, architecture=architecture) for i, label in enumerate(labels)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    dare = draw(st.sampled_from([None, 0.0, 0.5]))
    ties = draw(st.sampled_from([None, 0.3])) if dare is None else None
    if method == "average":
        averaging = Averaging(dare=None if dare is None else Dare("seed", dare), ties=ties)
        return average(models, dtype=dtype, averaging=averaging)
    routing = Routing(type="soft")
    common = {"routing": routing, "dtype": dtype, "random_seed": draw(st.integers(0, 3))}
    if method == "upcycle":
        mix = Mix(
            method="upcycle",
            copies=draw(st.integers(1, 3)),
            num_chunks=draw(st.sampled_from([1, 2, 3])),
            scale=draw(st.sampled_from(["down", "cube_root", "none"])),
            noise=draw(st.sampled_from([0.0, 0.1])),
            drop_ratio=draw(st.sampled_from([0.0, 0.4])),
            router_init=draw(st.sampled_from(["normal", "zeros", "uniform"])),
        )
        return mix_plan(models[:1], mix=mix, **common)
    mix = Mix(
        method=method if method in ("split", "blend") else "btx",
        num_chunks=draw(st.sampled_from([2, 3])) if method == "split" else 1,
        dare=dare,
        ties=ties,
        fold_norms=method == "btx" and draw(st.booleans()),
    )
    plan = mix_plan(models, mix=mix, **common)
    if method in ("append", "drop"):
        longer = append(memory(plan, "moe"), dense("z", 9, architecture=architecture), dtype=dtype)
        name = draw(st.sampled_from(longer.architecture.experts))
        return longer if method == "append" else drop(memory(longer, "moe"), name, dtype=dtype)
    return plan


@FEW
@given(st.data())
def test_a_slice_of_a_mix_is_the_slice_of_the_whole(data):
    """By either path: over canonical names, and resolved over what is stored."""
    plan = data.draw(plans())
    name = data.draw(st.sampled_from(sorted(plan.targets)))
    target = plan.targets[name]
    everything = plan.evaluate(name)
    assert everything.shape == plan.expected[name]
    box = data.draw(boxes(target.shape))
    part = everything[tuple(slice(*ends) for ends in box)]
    assert torch.equal(plan.evaluate(name, box), part)
    resolved = plan.resolved(target)
    assert torch.equal(resolved.evaluate(box, plan.read_stored), part)
    slab = data.draw(st.integers(1, 200))
    errors: list[UserError] = []
    streamed = b"".join(bytes(chunk) for chunk in Execution(slab=slab).stream(plan, target, errors))
    assert streamed == everything.contiguous().view(torch.uint8).numpy().tobytes()
    assert not errors


@FEW
@given(st.data())
def test_a_plan_covers_its_targets_and_accounts_for_its_sources(data):
    plan = data.draw(plans())
    assert plan.targets.keys() == plan.expected.keys()
    gone = data.draw(st.sampled_from(sorted(plan.targets)))
    targets = {name: target for name, target in plan.targets.items() if name != gone}
    with pytest.raises(UserError, match=f"tensor {gone} is missing"):
        Plan(plan.architecture, targets, plan.sources, plan.expected, plan.ignored)
    label = data.draw(st.sampled_from(sorted(plan.sources)))
    source = plan.sources[label]
    more = {name: read_whole(source, name) for name in source.tensors} | {"stray": torch.ones(1)}
    sources = {**plan.sources, label: MemorySource(more)}
    # Of many such errors only the first are told.
    with pytest.raises(UserError, match="(?s)stray is used by nothing|and \\d+ more like these"):
        Plan(plan.architecture, plan.targets, sources, plan.expected)
    read = {take.name for target in plan.targets.values() for take in takes(target)
            if take.source == label}  # fmt: skip
    missing = data.draw(st.sampled_from(sorted(read)))
    fewer = {name: tensor for name, tensor in more.items() if name not in (missing, "stray")}
    sources = {**plan.sources, label: MemorySource(fewer)}
    with pytest.raises(UserError, match=f"has no tensor {missing}"):
        Plan(plan.architecture, plan.targets, sources, plan.expected, plan.ignored)
