"""Whatever way Megatron stores a model, it is seen under the same canonical names, and back."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from megatron_btx.weights.arrange import Take
from megatron_btx.weights.box import whole
from megatron_btx.weights.megatron import canonical, stored
from megatron_btx.weights.source import MemorySource, read_whole, take_all
from tests.engine.test_layouts import TP2
from tests.weights.models import dense, moe_plan, tied
from tests.weights.ranks_side import save_as

WAYS = list(product([True, False], [True, False], [True, False], [True, False]))


def named_as(name: str, layers: bool, experts: bool, halves: bool, local: bool) -> list[str]:
    """The name or names under which one way of storing keeps a canonical tensor."""
    if name.startswith("decoder.layers."):
        _, _, layer, rest = name.split(".", 3)
        if ".experts." in rest:
            _, _, expert, weight = rest.split(".", 3)
            number = "" if experts else f"{expert}."
            rest = f"mlp.experts.experts.{number}{weight}"
        if local:
            rest = {
                "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
                "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
                "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
            }.get(rest, rest)
        name = f"decoder.layers.{rest}" if layers else f"decoder.layers.{layer}.{rest}"
    split = halves and name.endswith("linear_fc1.weight") and not ("experts.l" in name and experts)
    return [f"{name}_w", f"{name}_v"] if split else [name]


@pytest.mark.parametrize(("layers", "experts", "halves", "local"), WAYS)
@pytest.mark.parametrize("kind", ["moe", "dense", "tied"])
def test_any_way_of_storing_there_and_back(kind, layers, experts, halves, local):
    if kind == "moe":
        plan = moe_plan()
        architecture = plan.architecture
        tensors = {name: plan.evaluate(name) for name in plan.targets}
    else:
        model = dense("a", 1)
        architecture = model.architecture
        if kind == "tied":
            architecture = tied(architecture)
            model = dense("a", 1, architecture=architecture)
        tensors = {name: read_whole(model.source, name) for name in model.tensors}
    expressions = take_all("m", MemorySource(tensors))
    count, total = architecture.model.num_layers, len(architecture.experts)
    kept = {}
    for name, tensor in tensors.items():
        ways = named_as(name, layers, experts, halves, local)
        for way in ways:
            shape = tuple(tensor.shape)
            if len(ways) == 2:
                shape = (shape[0] // 2, *shape[1:])
            if ".experts.experts.linear" in way:
                shape = (total, *shape)
            if name.startswith("decoder.layers.") and layers:
                shape = (count, *shape)
            if "embedding" in name or "output" in name:
                shape = (128, *shape[1:])
            made = stored(way, shape, expressions)
            assert made.shape == shape
            source = MemorySource(tensors)
            kept[way] = made.evaluate(
                whole(shape), lambda _, name, box, source=source: source.read(name, box)
            )
    found = canonical(take_all("k", MemorySource(kept)), architecture)
    assert list(found) == list(tensors)
    source = MemorySource(kept)
    for name, expression in found.items():
        got = expression.evaluate(
            whole(expression.shape), lambda _, name, box: source.read(name, box)
        )
        assert torch.equal(got, tensors[name]), name


LAYERS, HALF = "decoder.layers.mlp.linear_fc2.weight", "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding.word_embeddings.weight", ()),
        ("output_layer.weight", ()),
        (LAYERS, ()),
        (LAYERS, (1 << 50, 0)),
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", ()),
        ("decoder.layers.0.mlp.experts.experts.linear_fc1.weight", (1 << 50, 0)),
        (HALF + "_w", ()),
    ],
)
def test_a_shape_that_no_tensor_of_a_model_has(name, shape):
    """It gets a name, and that a message (``mismatches``)."""
    takes = {name: Take("m", name, shape, torch.float32)}
    assert 0 < len(canonical(takes, dense("a", 1).architecture)) < 10


@pytest.mark.parametrize("shapes", [((4, 3), (4, 5)), ((), (4, 5)), ((), ())])
def test_halves_that_do_not_fit_are_named(shapes):
    names = (HALF + "_w", HALF + "_v")
    takes = {n: Take("m", n, s, torch.float32) for n, s in zip(names, shapes, strict=True)}
    with pytest.raises(ValueError, match="linear_fc1.weight_w and .*weight_v: cannot concatenate"):
        canonical(takes, dense("a", 1).architecture)


def test_halves_of_two_dtypes_are_joined_in_the_wider():
    halves = {HALF + "_w": torch.rand(48, 32), HALF + "_v": torch.rand(48, 32).bfloat16()}
    source = MemorySource(halves)
    (joined,) = canonical(take_all("m", source), dense("a", 1).architecture).values()
    found = joined.evaluate(whole(joined.shape), lambda _, name, box: source.read(name, box))
    assert torch.equal(found, torch.cat([half.float() for half in halves.values()]))


def test_a_name_that_nobody_knows():
    named = take_all("m", dense("a", 1).source)
    for name in ("decoder.layers.0.mlp.bias", "decoder.layers.mlp.router.weight", "lm_head"):
        with pytest.raises(KeyError):
            stored(name, (4, 2, 2), named)


def test_real_directories_of_other_forms(ranks, tmp_path):
    """Per-layer keys and fc1 in halves, as Megatron writes them when it is asked to."""
    from megatron_btx.weights.megatron import open_megatron

    ranks.run(save_as, 2, tmp_path / "plain", TP2, {})
    forms = {"singleton_local_shards": True, "non_homogeneous_layers": True}
    ranks.run(save_as, 2, tmp_path / "forms", TP2, forms)
    plain, other = (open_megatron(tmp_path / name, "m") for name in ("plain", "forms"))
    stored_names = set(other.source.of.tensors)
    assert any(name.endswith("_w") for name in stored_names)
    assert any(name.startswith("decoder.layers.1.") for name in stored_names)
    assert list(plain.tensors) == list(other.tensors)
    for name in plain.tensors:
        assert torch.equal(read_whole(plain.source, name), read_whole(other.source, name)), name
