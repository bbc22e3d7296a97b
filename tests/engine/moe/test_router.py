"""BTXRouter in Megatron: alone on one rank against plain loops, and two ranks against one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_btx.recipe.schema import Layout, MegatronOptions, Routing
from tests.engine.harness import MOE, Case, train
from tests.engine.moe.test_routing_functions import (
    paper_balance,
    paper_sample,
    paper_soft,
    paper_topk,
)
from tests.ranks import Ranks

LENGTH, BATCH, HIDDEN, EXPERTS, LAYERS = 12, 3, 16, 4, 3
SEQUENCES = [40, 7, 1000]
ROUTINGS = {
    "topk": Routing(balance_loss_coeff=0.5),
    "switch": Routing(type="switch", balance_loss_coeff=0.5, moe_expert_capacity_factor=1.0),
    "sample_top1": Routing(type="sample_top1", balance_loss_coeff=0.5, temperature_rate=0.01),
    "soft": Routing(type="soft", balance_loss_coeff=0.5),
    "megatron's losses": Routing(
        balance_loss_coeff=0.5,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.3,
        moe_z_loss_coeff=0.1,
    ),
}
ONE = Layout()


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


HIDDEN_STATES, WEIGHT = draw(0, LENGTH, BATCH, HIDDEN), draw(1, EXPERTS, HIDDEN) / 2
PULL = draw(2, LENGTH, BATCH, EXPERTS)
"""The gradient that a language model's loss might give the gates."""


def build(layout: Layout, routing: Routing, layer: int = 2, **megatron: Any) -> Any:
    """A router with WEIGHT under this layout, and the slice of a sequence-first tensor it sees."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_btx.engine import distributed
    from megatron_btx.engine.moe.router import BTXRouter
    from megatron_btx.engine.moe.router_config import transformer_fields

    distributed.initialize(layout, 1)
    tp, cp = layout.tensor_model_parallel_size, layout.context_parallel_size
    fields = transformer_fields(routing, EXPERTS) | {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "add_bias_linear": False,
        "tensor_model_parallel_size": tp,
        "context_parallel_size": cp,
        "sequence_parallel": tp > 1,
        "moe_token_dispatcher_type": "alltoall",
    }
    groups = get_default_pg_collection()
    router = BTXRouter(TransformerConfig(**fields | megatron), groups, routing=routing)
    router.set_layer_number(layer)
    router.weight.data.copy_(WEIGHT)

    def mine(whole: Tensor) -> Tensor:
        if cp > 1:
            chunks = whole.chunk(2 * cp)
            whole = torch.cat([chunks[groups.cp.rank()], chunks[-1 - groups.cp.rank()]])
        return whole.chunk(tp)[groups.tp.rank()].contiguous()

    return router, mine


def train_once(layout: Layout, routing: Routing, recompute: bool = False) -> dict[str, Tensor]:
    """Forward and backward of a training micro-batch; what this rank got."""
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe import moe_utils

    from megatron_btx.engine.moe.loss_tracker import tracked
    from megatron_btx.engine.moe.noise import set_routing_context

    router, mine = build(layout, routing)
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    set_routing_context(20, torch.tensor(SEQUENCES))
    x = mine(HIDDEN_STATES).requires_grad_()
    if recompute:
        gates, routing_map = tensor_parallel.checkpoint(router, False, x)
        set_routing_context(20, torch.tensor([1, 2, 3]))  # another micro-batch comes between
    else:
        gates, routing_map = router(x)
    (gates * mine(PULL).view_as(gates)).sum().backward()
    names = [name for name in tracked() if name != "z_loss"]  # 0.16 logs this rank's share only
    moe_utils.reduce_aux_losses_tracker_across_ranks(names)
    logged = {name: tracked()[name].values.clone() for name in names}
    positions = mine(torch.arange(LENGTH).view(-1, 1).expand(-1, BATCH))
    return {
        "place": (positions * BATCH + torch.arange(BATCH)).flatten(),
        "gates": gates.detach(),
        "map": routing_map,
        "x_grad": x.grad.view(-1, HIDDEN),
        "weight_grad": router.weight.grad,
        **logged,
    }


def whole(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One micro-batch from the ranks' parts: tokens in order, gradients of weights added up."""
    order = torch.cat([part["place"] for part in parts]).argsort()
    result = {k: torch.cat([p[k] for p in parts])[order] for k in ("gates", "map", "x_grad")}
    result["weight_grad"] = torch.stack([p["weight_grad"] for p in parts]).sum(0)
    for name in parts[0].keys() - result.keys() - {"place"}:
        assert all(torch.equal(p[name], parts[0][name]) for p in parts), name
        result[name] = parts[0][name]
    return result


def paper(routing: Routing, gumbel: Tensor) -> tuple[Tensor, float]:
    """Gates (drops included) and balance loss over alpha, by loops in float64."""
    logits = HIDDEN_STATES.double() @ WEIGHT.double().t()
    gates, rows = [], logits.view(-1, EXPERTS).tolist()
    tau = max(0.5, 2.718281828459045 ** (-0.01 * 20))
    for row, noise_row in zip(rows, gumbel.view(-1, EXPERTS).tolist(), strict=True):
        full = paper_soft(row)
        gates.append(
            {
                "topk": paper_topk(row, 2),
                "switch": [g if g == max(full) else 0.0 for g in full],
                "sample_top1": paper_sample(row, noise_row, tau),
                "soft": full,
            }[routing.type]
        )
    loss = paper_balance(gates, rows, 1.0)
    if routing.type == "switch":
        taken, limit = [0] * EXPERTS, -(-len(rows) // EXPERTS)  # capacity factor 1
        for gate_row in gates:
            for expert, gate in enumerate(gate_row):
                taken[expert] += gate > 0
                gate_row[expert] = gate if taken[expert] <= limit else 0.0
    return torch.tensor(gates, dtype=torch.float64), loss


def noise_of(sequences: list[int]) -> Tensor:
    from megatron_btx.engine.moe import noise

    context = noise.RoutingContext(torch.tensor(20), torch.tensor(sequences))
    return noise.gumbel(noise.layer_key(0, 2), context, torch.arange(LENGTH), EXPERTS)


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """Every routing function on one rank."""
    return {k: whole(ranks.run(train_once, 1, ONE, v)) for k, v in ROUTINGS.items()}


@pytest.mark.parametrize("name", ROUTINGS)
def test_router_is_the_papers(alone: dict[str, dict[str, Tensor]], name: str) -> None:
    gates, loss = paper(ROUTINGS[name], noise_of(SEQUENCES))
    ours = alone[name]
    assert ours["gates"].dtype == torch.float32
    torch.testing.assert_close(ours["gates"], gates.float())
    assert torch.equal(ours["map"], gates > 0)
    expected = torch.zeros(LAYERS)
    expected[1] = loss
    torch.testing.assert_close(ours["btx_balance_loss"], expected)


@pytest.mark.parametrize("name", ["topk", "switch", "sample_top1", "soft"])
def test_gradient_holds_the_balance_loss(alone: dict[str, dict[str, Tensor]], name: str) -> None:
    """Against autograd through the formula itself, in float64."""
    weight = WEIGHT.double().requires_grad_()
    x = HIDDEN_STATES.double().view(-1, HIDDEN).requires_grad_()
    logits = x @ weight.t()
    full = logits.exp() / logits.exp().sum(1, keepdim=True)
    kept = alone[name]["map"]
    if name == "topk":
        gates = logits.exp() * kept / (logits.exp() * kept).sum(1, keepdim=True)
    elif name == "sample_top1":
        scores = ((logits + noise_of(SEQUENCES).view_as(logits)) / torch.e ** (-0.2)).exp()
        gates = scores / scores.sum(1, keepdim=True) * kept
    else:
        gates = full * (full == full.amax(1, keepdim=True)) if name == "switch" else full
    loss = 0.5 * EXPERTS * (gates.mean(0) * full.mean(0)).sum()
    ((gates * kept * PULL.double().view_as(gates)).sum() + loss).backward()
    for key, expected in (("weight_grad", weight.grad), ("x_grad", x.grad)):
        torch.testing.assert_close(alone[name][key].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("axis", ["tensor_model_parallel_size", "context_parallel_size"])
def test_two_ranks_route_as_one(
    ranks: Ranks, alone: dict[str, dict[str, Tensor]], axis: str, name: str
) -> None:
    two = whole(ranks.run(train_once, 2, Layout(**{axis: 2}), ROUTINGS[name]))
    assert two.keys() == alone[name].keys()
    assert torch.equal(two["map"], alone[name]["map"])
    for key, value in alone[name].items():
        if key == "z_loss" or value.dtype == torch.bool:
            continue  # upstream logs z_loss as this rank's share
        torch.testing.assert_close(
            two[key], value, atol=2e-6, rtol=1e-5, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("name", ROUTINGS)
def test_recomputation_routes_alike(
    ranks: Ranks, alone: dict[str, dict[str, Tensor]], name: str
) -> None:
    again = whole(ranks.run(train_once, 1, ONE, ROUTINGS[name], True))
    for key, value in alone[name].items():
        assert torch.equal(again[key], value), key


def inference() -> None:
    from megatron_btx.engine.moe.noise import set_routing_context

    greedy = dataclasses.replace(ROUTINGS["sample_top1"], greedy=True)
    best = (HIDDEN_STATES @ WEIGHT.t()).view(-1, EXPERTS).argmax(1)
    router, _ = build(ONE, greedy)
    gates, routing_map = router.eval()(HIDDEN_STATES)  # needs no context
    assert torch.equal(gates, torch.nn.functional.one_hot(best, EXPERTS).float())
    assert torch.equal(routing_map, gates > 0)
    router, _ = build(ONE, ROUTINGS["sample_top1"])
    with pytest.raises(RuntimeError, match="set_routing_context"):
        router.eval()(HIDDEN_STATES)
    set_routing_context(20, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="2 sequences, but the batch has 3"):
        router(HIDDEN_STATES)
    set_routing_context(20, torch.tensor(SEQUENCES))
    gates, _ = router(HIDDEN_STATES)
    drawn = (HIDDEN_STATES @ WEIGHT.t() + noise_of(SEQUENCES)).view(-1, EXPERTS).argmax(1)
    assert torch.equal(gates, torch.nn.functional.one_hot(drawn, EXPERTS).float())
    assert not torch.equal(drawn, best)
    for name in ("topk", "soft", "switch"):  # the same routes as in training, and no loss
        router, _ = build(ONE, ROUTINGS[name])
        trained, evaluated = router(HIDDEN_STATES)[0], router.eval()(HIDDEN_STATES)[0]
        assert torch.equal(trained, evaluated)
        assert "AuxLoss" not in type(evaluated.grad_fn).__name__


def test_inference_rules(ranks: Ranks) -> None:
    ranks.run(inference, 1)


def first_layer() -> None:
    from megatron_btx.engine.moe.noise import set_routing_context

    set_routing_context(0, torch.tensor(SEQUENCES))
    for layer, soft_first, experts in ((1, True, EXPERTS), (2, True, 1), (1, False, 1)):
        recipe = dataclasses.replace(ROUTINGS["sample_top1"], first_layer_soft=soft_first)
        router, _ = build(ONE, recipe, layer)
        set_routing_context(0, torch.tensor(SEQUENCES))
        for mode in (True, False):
            gates, routing_map = router.train(mode)(HIDDEN_STATES)
            assert (routing_map.sum(1) == experts).all()
            if experts > 1:
                torch.testing.assert_close(gates.sum(1), torch.ones(len(gates)))
    bf16, _ = build(ONE, ROUTINGS["topk"], params_dtype=torch.bfloat16)
    bf16.weight.data = bf16.weight.data.bfloat16()
    x = HIDDEN_STATES.bfloat16()
    assert bf16(x)[0].dtype == torch.float32
    exact = x.float() @ WEIGHT.bfloat16().float().t()
    torch.testing.assert_close(bf16.gating(x), exact, rtol=1e-5, atol=1e-6)


def test_first_layer_of_sample_top1_is_soft_and_logits_are_fp32(ranks: Ranks) -> None:
    ranks.run(first_layer, 1)


def moe_layers(name: str) -> None:
    """Whole MoE layers with Megatron's dispatcher and experts."""
    import functools

    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron_btx.engine.megatron_release import MOE_SPEC_IS_PARTIAL
    from megatron_btx.engine.moe.noise import set_routing_context
    from megatron_btx.engine.moe.router import BTXRouter, collect_load, forced_routing

    recipe = ROUTINGS[name]
    config = build(ONE, recipe, moe_ffn_hidden_size=8, gradient_accumulation_fusion=False)[0].config
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    submodules = spec.keywords["submodules"] if MOE_SPEC_IS_PARTIAL else spec.submodules
    submodules.router = functools.partial(BTXRouter, routing=recipe)
    layers = torch.nn.ModuleList()
    for number in range(1, LAYERS + 1):
        layer = MoELayer(config, submodules)
        layer.set_layer_number(number)
        layers.append(layer)
    layers.eval()
    set_routing_context(3, torch.tensor(SEQUENCES))
    x = draw(5, LENGTH, BATCH, HIDDEN)
    with torch.no_grad():
        for layer in layers:
            outputs = [expert(x)[0].view(-1, HIDDEN) for expert in layer.experts.local_experts]
            for index, expected in enumerate(outputs):
                with forced_routing(layers, index):
                    assert torch.equal(layer(x)[0].view(-1, HIDDEN), expected)
        with collect_load(list(layers)) as load:
            for layer in layers:
                gates, routing_map = layer.router(x)
                outputs = [expert(x)[0].view(-1, HIDDEN) for expert in layer.experts.local_experts]
                expected = sum(gates[:, [i]] * output for i, output in enumerate(outputs))
                torch.testing.assert_close(layer(x)[0].view(-1, HIDDEN), expected)
                number = layer.router.layer_number - 1
                assert torch.equal(load.tokens[number], 2.0 * routing_map.sum(0))
                torch.testing.assert_close(load.gates[number], 2.0 * gates.double().sum(0))
        before = load.tokens.clone()
        layers[0](x)
        assert torch.equal(load.tokens, before)
    if name != "switch":  # which drops
        per_token = {"topk": 2, "soft": EXPERTS}.get(recipe.type, 1)
        counts = [float(EXPERTS if recipe.type == "sample_top1" else per_token)] + [per_token] * 2
        rows = 2.0 * LENGTH * BATCH
        assert load.tokens.sum(1).tolist() == [count * rows for count in counts]


@pytest.mark.parametrize("name", ["topk", "switch", "sample_top1", "soft"])
def test_layers_forced_routing_and_load(ranks: Ranks, name: str) -> None:
    ranks.run(moe_layers, 1, name)


@pytest.mark.parametrize("name", ["switch", "sample_top1", "soft"])
def test_whole_models_train_as_on_one_rank(ranks: Ranks, name: str) -> None:
    """TP x PP x EP with full recomputation, two sequences a micro-batch: 1F1B runs later
    micro-batches between a layer's forward pass and its recomputation."""
    architecture = dataclasses.replace(MOE, routing=ROUTINGS[name])
    alone = Case(architecture, steps=3)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform"}
    layout = Layout(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    )
    together = dataclasses.replace(
        alone,
        layout=layout,
        megatron=MegatronOptions(transformer=recompute | {"recompute_num_layers": 1}),
    )
    expected, found = ranks.run(train, 1, alone)[0], ranks.run(train, 4, together)[0]
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=1e-4)


def router_errors() -> list[str]:

    found = []
    for megatron in (
        {"moe_router_fusion": True, "moe_router_score_function": "sigmoid"},
        {"moe_router_topk": 3, "moe_expert_capacity_factor": 2.0},
        {"tensor_model_parallel_size": 2, "sequence_parallel": False},
    ):
        with pytest.raises(ValueError) as error:
            build(ONE, ROUTINGS["topk"], **megatron)
        found.append(str(error.value))
    return found


def beside_transformer_engine() -> list[str]:
    """What ``check_config`` says where its layers are not, option by option; where they are, it
    allows them."""
    from megatron_btx.engine.model import transformer_config
    from megatron_btx.engine.moe.router_config import check_config
    from megatron_btx.engine.platform import Platform
    from megatron_btx.errors import UserError

    config = transformer_config(MOE, ONE, "fp32")
    assert MOE.routing is not None
    machine = Platform(cuda=True, transformer_engine=True, apex=False)
    said = []
    for name, value in (
        ("moe_router_force_load_balancing", True),
        ("moe_token_dispatcher_type", "flex"),
        ("moe_router_fusion", True),
    ):
        changed = copy.copy(config)
        setattr(changed, name, value)  # Megatron itself refuses some of them on this machine
        check_config(changed, MOE.routing, machine)
        with pytest.raises(UserError) as error:
            check_config(changed, MOE.routing)
        said.append(str(error.value))
    switch = Routing(type="switch")
    config = transformer_config(dataclasses.replace(MOE, routing=switch), ONE, "fp32")
    config.moe_router_fusion = True
    with pytest.raises(UserError, match="routing type is 'switch'"):
        check_config(config, switch, machine)
    return said


def test_options_that_are_transformer_engines(ranks: Ranks) -> None:
    for said in ranks.run(beside_transformer_engine, 1)[0]:
        assert "is not supported by BTXRouter without Transformer Engine" in said


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_what_the_fused_kernel_computes_is_our_topk(pre_softmax: bool) -> None:
    from megatron_btx.engine.moe import routing_functions
    from megatron_btx.engine.moe.router import megatron_topk

    logits = draw(3, 40, EXPERTS)
    gates, chosen = megatron_topk(logits, 2, use_pre_softmax=pre_softmax, fused=False)
    ours = (routing_functions.topk_of_all if pre_softmax else routing_functions.topk)(logits, 2)
    torch.testing.assert_close(gates, ours[0], rtol=1e-6, atol=1e-7)
    assert torch.equal(chosen, ours[1])


def test_what_the_router_would_not_follow_is_refused(ranks: Ranks) -> None:
    unsupported, unfit, parallel = ranks.run(router_errors, 1)[0]
    assert "moe_router_fusion" in unsupported
    assert "moe_router_score_function" in unsupported
    assert "moe_router_topk: 3" in unfit
    assert "moe_expert_capacity_factor" in unfit
    assert "sequence_parallel" in parallel


@pytest.mark.parametrize("k", [1, 5])
def test_impossible_k(k: int) -> None:
    from megatron_btx.engine.moe.router_config import transformer_fields
    from megatron_btx.errors import UserError

    with pytest.raises(UserError, match="routing.moe_router_topk"):
        transformer_fields(Routing(moe_router_topk=k), EXPERTS)
