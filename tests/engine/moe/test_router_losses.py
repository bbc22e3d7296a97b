"""The losses that a router adds: Megatron's own beside the paper's, what is logged of them, and how
they are scaled."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_btx.recipe.schema import Layout, Routing
from tests.engine.moe.test_router import (
    BATCH,
    HIDDEN,
    HIDDEN_STATES,
    LENGTH,
    ONE,
    PULL,
    ROUTINGS,
    WEIGHT,
    build,
    draw,
)
from tests.ranks import Ranks


def own_losses_of_upstream() -> None:
    """Without the paper's loss, our top-2 and Megatron's are one: gradients, logged losses."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_btx.engine.moe import loss_tracker

    for kind in ("aux_loss", "seq_aux_loss"):
        recipe = dataclasses.replace(
            ROUTINGS["megatron's losses"], balance_loss_coeff=0, moe_router_load_balancing_type=kind
        )
        ours, _ = build(ONE, recipe)
        upstream = TopKRouter(ours.config, moe_utils.get_default_pg_collection())
        upstream.set_layer_number(2)
        upstream.weight.data.copy_(WEIGHT)
        logged = []
        for router in (ours, upstream):
            loss_tracker.forget()
            gates, _ = router(HIDDEN_STATES)
            (gates * PULL.view_as(gates)).sum().backward()
            logged.append({name: e.values for name, e in loss_tracker.tracked().items()})
        torch.testing.assert_close(ours.weight.grad, upstream.weight.grad)
        assert logged[0].keys() == logged[1].keys()
        torch.testing.assert_close(logged[0], logged[1])


def test_megatrons_own_losses(ranks: Ranks) -> None:
    ranks.run(own_losses_of_upstream, 1)


def logged_over_data_parallel() -> tuple[float, float]:
    from megatron.core.transformer.moe import moe_utils

    from megatron_btx.engine.moe.loss_tracker import tracked

    router, _ = build(Layout(data_parallel_size=2), ROUTINGS["topk"])
    rank = torch.distributed.get_rank()
    for microbatch in (0, 1):
        router(draw(2 * rank + microbatch, LENGTH, BATCH, HIDDEN))
    values = tracked()["btx_balance_loss"].values
    own = float(values[1])
    moe_utils.reduce_aux_losses_tracker_across_ranks()
    return own, float(values[1])


def test_logged_loss_is_averaged_over_data_parallel_ranks(ranks: Ranks) -> None:
    (own0, mean0), (own1, mean1) = ranks.run(logged_over_data_parallel, 2)
    assert own0 != own1
    assert mean0 == mean1 == pytest.approx((own0 + own1) / 2)


def logged_z_loss(layout: Layout) -> float:
    from megatron_btx.engine.moe.loss_tracker import pop_balance_loss
    from megatron_btx.engine.moe.router import routers

    router, mine = build(layout, Routing(moe_z_loss_coeff=1e-3, balance_loss_coeff=0.0))
    assert routers(router)
    router(mine(HIDDEN_STATES))
    return pop_balance_loss(1)["router_z_loss"]


def test_the_logged_z_loss_is_all_ranks(ranks: Ranks) -> None:
    alone = ranks.run(logged_z_loss, 1, ONE)[0]
    assert alone > 0
    for layout in (Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),):
        assert ranks.run(logged_z_loss, 2, layout) == pytest.approx([alone, alone])


def loss_per_token(layout: Layout) -> Tensor:
    router, mine = build(layout, ROUTINGS["topk"], calculate_per_token_loss=True)
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)
    gates, _ = router(mine(HIDDEN_STATES))
    (gates * 0).sum().backward()
    return router.weight.grad / (LENGTH * BATCH)  # as finalize_model_grads divides


def test_loss_per_token_keeps_alpha(ranks: Ranks) -> None:
    one = ranks.run(loss_per_token, 1, ONE)[0]
    two = sum(ranks.run(loss_per_token, 2, Layout(tensor_model_parallel_size=2)))
    weight = WEIGHT.double().requires_grad_()
    logits = HIDDEN_STATES.double().view(-1, HIDDEN) @ weight.t()
    from megatron_btx.engine.moe import routing_functions

    u, p = routing_functions.topk(logits, 2)[0].mean(0), logits.softmax(1).mean(0)
    routing_functions.balance_loss(u, p, 0.5).backward()
    torch.testing.assert_close(one.double(), weight.grad, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(two, one)
