"""Megatron's TopKRouter with the paper's routing functions and balance loss.

It replaces ``TopKRouter`` in a layer specification. Megatron's configuration needs the values of
``transformer_fields`` (router_config.py):

    MoESubmodules(experts=..., router=functools.partial(BTXRouter, routing=routing, random_seed=1))
    TransformerConfig(..., **transformer_fields(routing, num_experts))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    router_gating_linear,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import all_gather_into_tensor

from megatron_btx.engine.moe import loss_tracker, noise, routing_functions
from megatron_btx.engine.moe.loss_tracker import BALANCE_LOSS
from megatron_btx.engine.moe.router_config import check_config
from megatron_btx.engine.moe.routing_functions import Routes
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Routing


class BTXRouter(TopKRouter):
    """Routes each token by the recipe's routing function g (sections 3.2 and 3.3).

    ``forward`` takes hidden states [s, b, H] (s: this rank's slice of the sequence) and returns
    gates and routing map, both [s * b, N]; logits and gates are fp32. In training, the balance
    losses are attached to the gates (``MoEAuxLossAutoScaler``). Routing with noise needs
    ``noise.set_routing_context`` before each forward pass.

    Args:
        config: with ``transformer_fields(routing, num_experts)`` in it.
        pg_collection: Megatron's process groups.
        is_mtp_layer: Megatron's; layers that predict further tokens are refused with their options.
        routing: the recipe's.
        random_seed: keys the noise of Sample Top-1.

    Raises:
        ValueError: the configuration asks for something that this router does not implement.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        routing: Routing,
        random_seed: int = 0,
    ) -> None:
        assert not is_mtp_layer
        try:
            check_config(config, routing)
        except UserError as wrong:
            # Megatron catches what is raised while it builds a layer, and keeps the text alone.
            raise ValueError(str(wrong)) from None
        super().__init__(config, pg_collection)
        self.recipe = routing
        self.random_seed = random_seed
        self.function: str = routing.type
        self.noise_key = 0
        self.forced_expert: int | None = None
        self.dropless = False
        self.load: Load | None = None  # while collect_load() is on
        self.gates: Tensor | None = None  # while collect_gates() is on

    def set_layer_number(self, layer_number: int) -> None:
        """Layers count from 1 over the whole model; the first one of Sample Top-1 may be soft."""
        super().set_layer_number(layer_number)
        self.noise_key = noise.layer_key(self.random_seed, layer_number)
        if self.recipe.type == "sample_top1" and self.recipe.first_layer_soft and layer_number == 1:
            self.function, self.topk = "soft", self.num_experts

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``W x`` [s, b, N]. Megatron's version would move the weights to a GPU first."""
        dtype = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        return router_gating_linear(input, self.weight, self.bias, dtype)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Routes:
        """Gates and routing map [s * b, N] of logits [s, b, N]."""
        assert padding_mask is None, "batches are whole sequences: nothing is padded"
        length, batch, num_experts = logits.shape
        logits = logits.view(-1, num_experts)
        if self.forced_expert is not None:
            return routing_functions.forced(logits, self.forced_expert, self.topk)
        logits = self.apply_z_loss(logits)
        gates, routing_map = self.routes(logits, length)
        if self.training and torch.is_grad_enabled():
            gates = self._attach_balance_losses(gates, routing_map, logits, length, batch)
        if self.function == "switch" and not self.dropless:
            routing_map = self._drop(routing_map, length)
            gates = gates * routing_map
        if self.load is not None:
            self._count(self.load, routing_map, gates.detach(), length)
        if self.gates is not None:
            assert batch == 1, "the gates of one sequence are collected"
            here = self._positions(length, gates.device)
            self.gates[self.layer_number - 1, here] += gates.detach() * routing_map
        return gates, routing_map

    def _count(self, load: Load, routing_map: Tensor, gates: Tensor, length: int) -> None:
        """Add this micro-batch's tokens, except padding, to the load."""
        if load.mask is not None:  # [b, S] -> this rank's [s * b, 1]
            positions = self._positions(length, load.mask.device)
            counts = load.mask.bool().T[positions].reshape(-1, 1).to(gates.device)
            routing_map, gates = routing_map * counts, gates * counts
        load.tokens[self.layer_number - 1] += routing_map.sum(0)
        load.gates[self.layer_number - 1] += gates.sum(0)

    def routes(self, logits: Tensor, length: int) -> Routes:
        """Gates and routing map [s * b, N] of logits [s * b, N], before capacity and losses."""
        if self.config.moe_router_fusion:  # check_config: topk
            pre_softmax = self.recipe.moe_router_pre_softmax
            return megatron_topk(logits, self.topk, use_pre_softmax=pre_softmax, fused=True)
        if self.function == "topk":
            function = (
                routing_functions.topk_of_all
                if self.recipe.moe_router_pre_softmax
                else routing_functions.topk
            )
            return function(logits, self.topk)
        if self.function == "switch":
            return routing_functions.switch(logits)
        if self.function == "soft":
            return routing_functions.soft(logits)
        if not self.training and self.recipe.greedy:
            return routing_functions.draw_top1(logits, noise=None)
        context = noise.routing_context()
        if len(context.sequences) * length != len(logits):
            told = f"set_routing_context got {len(context.sequences)} sequences"
            raise RuntimeError(f"{told}, but the batch has {len(logits) // length}")
        positions = self._positions(length, logits.device)
        drawn = noise.gumbel(self.noise_key, context, positions, self.num_experts)
        drawn = drawn.view_as(logits).to(logits.dtype)
        if not self.training:
            return routing_functions.draw_top1(logits, drawn)
        tau = routing_functions.temperature(
            context.step, self.recipe.temperature_min, self.recipe.temperature_rate
        )
        return routing_functions.sample_top1(logits, drawn, tau.to(logits))

    def _attach_balance_losses(
        self, gates: Tensor, routing_map: Tensor, logits: Tensor, length: int, batch: int
    ) -> Tensor:
        """Attach the paper's loss, then Megatron's own, computed before tokens are dropped: a loss
        on what an expert's capacity leaves would not see that the expert overflows."""
        probabilities = routing_functions.softmax(logits)
        if self.recipe.balance_loss_coeff:
            gates = self._attach_paper_loss(gates, probabilities)
        if self.is_aux_loss_enabled():
            gates = self._apply_aux_loss(gates, probabilities, routing_map)
            gates = self._apply_seq_aux_loss(gates, probabilities, routing_map, length, batch)
        return gates

    def _attach_paper_loss(self, gates: Tensor, probabilities: Tensor) -> Tensor:
        """The means are over the micro-batch's tokens of the whole TP x CP group, whose ranks have
        the same loss; each computes the gradient of its own tokens, and Megatron sums these."""
        alpha, tokens = self.recipe.balance_loss_coeff, len(gates) * self.tp_cp_group.size()
        sums = torch.stack([gates.sum(0), probabilities.sum(0)])
        u, p = reduce_from_tensor_model_parallel_region(sums, self.tp_cp_group) / tokens
        loss = routing_functions.balance_loss(u, p, alpha)
        loss_tracker.record(
            BALANCE_LOSS,
            loss / alpha,
            self.layer_number,
            self.config.num_layers,
            avg_group=self.tp_dp_cp_group,  # equal over TP and CP already: average, not sum
        )
        # With a loss per token Megatron divides all gradients by the tokens of the global batch.
        return MoEAuxLossAutoScaler.apply(
            gates, loss * tokens if self.calculate_per_token_loss else loss
        )

    def _drop(self, routing_map: Tensor, length: int) -> Tensor:
        """Apply Switch's capacity to the tokens of the whole TP x CP group: an expert takes the
        first ones, in the order of position, then sequence. A rank has one contiguous range of
        positions, two under context parallelism; the counts in all earlier ranges give its own
        tokens' places in the experts' queues."""
        group, runs = self.tp_cp_group, 1 if self.cp_group.size() == 1 else 2
        limit = routing_functions.capacity(
            len(routing_map) * group.size(),
            self.num_experts,
            self.recipe.moe_expert_capacity_factor,
        )
        queues = routing_map.view(runs, -1, self.num_experts)
        starts = self._positions(length, routing_map.device).view(runs, -1)[:, :1]
        mine = torch.cat([starts, queues.sum(1)], dim=1)  # [runs, 1 + N]
        every = mine
        if group.size() > 1:
            every = mine.new_empty(group.size() * runs, mine.shape[1])
            all_gather_into_tensor(every, mine, group=group)
        earlier = every[:, 0] < starts  # [runs, all runs]
        before = (earlier.unsqueeze(2) * every[:, 1:]).sum(1)
        return routing_functions.within_capacity(queues, before, limit).view_as(routing_map)

    def _positions(self, length: int, device: torch.device) -> Tensor:
        tp, cp = self.tp_group, self.cp_group
        return routing_functions.token_positions(
            length, tp=(tp.rank(), tp.size()), cp=(cp.rank(), cp.size())
        ).to(device)


def megatron_topk(logits: Tensor, k: int, *, use_pre_softmax: bool, fused: bool) -> Routes:
    """Megatron's own top-k. Fused, it is a kernel of Transformer Engine, which may choose another
    expert than ours among equal logits."""
    gates, routing_map = topk_routing_with_score_function(
        logits, k, use_pre_softmax=use_pre_softmax, fused=fused
    )
    return gates, routing_map


def routers(model: torch.nn.Module | Iterable[torch.nn.Module]) -> list[BTXRouter]:
    """The routers of a model, or of the model chunks on this rank."""
    chunks = [model] if isinstance(model, torch.nn.Module) else model
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, BTXRouter)]


@contextmanager
def forced_routing(
    model: torch.nn.Module | Iterable[torch.nn.Module], expert: int
) -> Iterator[None]:
    """Within the block, every layer routes every token to one expert (0 to N - 1), weight 1."""
    found = routers(model)
    for router in found:
        assert 0 <= expert < router.num_experts, f"no expert {expert} of {router.num_experts}"
        router.forced_expert = expert
    try:
        yield
    finally:
        for router in found:
            router.forced_expert = None


@contextmanager
def dropless(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within the block Switch's capacity drops no tokens: for evaluations, where the result for a
    text must not depend on the other texts in its batch."""
    found = routers(model)
    before = [router.dropless for router in found]
    for router in found:
        router.dropless = True
    try:
        yield
    finally:
        for router, was in zip(found, before, strict=True):
            router.dropless = was


@contextmanager
def collect_gates(model: torch.nn.Module, length: int) -> Iterator[Tensor]:
    """Within the block, keep the gates of one sequence, token by token, without dropped tokens:
    float64 [layers, length, N], 0 of experts that were not chosen. Positions and layers of other
    ranks are 0, as in :class:`Load`."""
    found = routers(model)
    config, device = found[0].config, found[0].weight.device
    shape = (config.num_layers, length, config.num_moe_experts)
    gates = torch.zeros(shape, dtype=torch.float64, device=device)
    for router in found:
        router.gates = gates
    try:
        yield gates
    finally:
        for router in found:
            router.gates = None


@dataclass
class Load:
    """Tokens and gates by layer and expert, float64 [layers, N], without dropped tokens. Layers of
    other pipeline stages are 0, so that the sum over all ranks is that of the whole model."""

    tokens: Tensor
    gates: Tensor
    """Sums of gates; divided by ``tokens``, an expert's mean gate."""
    mask: Tensor | None = None
    """[b, S] of the next micro-batch: only tokens where it is not 0 are counted."""


@contextmanager
def collect_load(model: torch.nn.Module | Iterable[torch.nn.Module]) -> Iterator[Load]:
    """Within the block, sum up the tokens and gates of each layer's experts."""
    found = routers(model)
    assert found, "no BTXRouter in this model"
    config, device = found[0].config, found[0].weight.device
    totals = torch.zeros(
        2, config.num_layers, config.num_moe_experts, dtype=torch.float64, device=device
    )
    load = Load(tokens=totals[0], gates=totals[1])
    for router in found:
        router.load = load
    try:
        yield load
    finally:
        for router in found:
            router.load = None
