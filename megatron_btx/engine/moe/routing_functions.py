"""The paper's routing functions g and its balance loss (arXiv 2403.07816, sections 3.2 and 3.3).

A mixture layer computes ``sum_i g_i(W x) FF_i(x)``. Every function here takes the router's logits
``W x`` of T tokens over N experts and returns ``(gates, routing_map)``:

    gates        [T, N]  g(W x), in the logits' dtype; exactly 0 where an expert does not run
    routing_map  [T, N]  bool, the experts that run

Gradients flow through the gates into the logits. Of equal logits the expert of lower index is
chosen (``torch.topk`` does not specify it), so a router of zeros routes alike on every machine and
layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Routes = tuple[Tensor, Tensor]


def topk(logits: Tensor, k: int) -> Routes:
    """``SoftMax(TopK(W x))`` (section 3.2): the k best logits first, softmax over those alone."""
    chosen = largest(logits, k)
    return softmax(logits.masked_fill(~chosen, -torch.inf)), chosen


def topk_of_all(logits: Tensor, k: int) -> Routes:
    """The k largest of ``SoftMax(W x)``, not renormalised: Megatron's ``moe_router_pre_softmax``,
    Qwen's MoEs without ``norm_topk_prob``."""
    chosen = largest(logits, k)
    return softmax(logits) * chosen, chosen


def soft(logits: Tensor) -> Routes:
    """``SoftMax(W x)``: every expert runs for every token (section 3.3)."""
    return softmax(logits), torch.ones_like(logits, dtype=torch.bool)


def switch(logits: Tensor) -> Routes:
    """Top-1 of Fedus et al. (section 3.3): the gate is the best expert's full softmax probability,
    which, unlike ``topk`` with k = 1, lets the language model's loss reach the router."""
    return topk_of_all(logits, 1)


def sample_top1(logits: Tensor, noise: Tensor, tau: Tensor | float) -> Routes:
    """Sample Top-1 in training (section 3.3): a soft Gumbel-softmax sample of which all but
    the largest entry is zeroed. ``noise``: standard Gumbel [T, N]; ``tau``: ``temperature()``."""
    scores = (logits + noise) / tau
    chosen = largest(scores, 1)
    return softmax(scores) * chosen, chosen


def draw_top1(logits: Tensor, noise: Tensor | None) -> Routes:
    """Sample Top-1 at inference ("hard sampling"): one expert with weight 1, drawn from
    ``SoftMax(W x)`` by the Gumbel-max trick, or the most likely one if ``noise`` is None."""
    chosen = largest(logits if noise is None else logits + noise, 1)
    return chosen.to(logits.dtype), chosen


def temperature(step: Tensor, minimum: float, rate: float) -> Tensor:
    """tau of Sample Top-1, ``max(minimum, exp(-rate * step))``: Jang et al.'s schedule, which
    section 3.3 cites (the paper's ``max(0.5, -rt)`` lacks the exponential)."""
    return torch.exp(-rate * step.double()).clamp(min=minimum)


def forced(logits: Tensor, expert: int, k: int) -> Routes:
    """Every token to one expert with weight 1. The k - 1 experts after it run with weight 0,
    because the dispatcher of a top-k model expects k rows per token."""
    place = (torch.arange(logits.shape[1], device=logits.device) - expert) % logits.shape[1]
    return (place == 0).to(logits).expand_as(logits), (place < k).expand_as(logits)


def capacity(tokens: int, num_experts: int, factor: float) -> int:
    """Expert capacity under ``switch``: the most tokens of a micro-batch that an expert takes."""
    return math.ceil(factor * tokens / num_experts)


def within_capacity(routing_map: Tensor, before: Tensor, limit: int) -> Tensor:
    """A routing map bool [..., T, N] with only the first ``limit`` tokens of each expert.

    ``before`` [..., N]: how many earlier tokens, those of other ranks, chose each expert.
    """
    place = routing_map.cumsum(-2) + before.unsqueeze(-2)  # in its expert's queue, from 1
    return routing_map & (place <= limit)


def balance_loss(u: Tensor, p: Tensor, alpha: float) -> Tensor:
    """``L_LB = alpha N sum_i u_i p_i`` of one layer (section 3.3).

    ``u`` [N] is the batch's mean gate weight of each expert and ``p`` [N] its mean softmax
    probability. Both have gradients; Switch's own loss has the share of tokens in place of ``u``.
    """
    return alpha * len(u) * (u * p).sum()


def largest(scores: Tensor, k: int) -> Tensor:
    """Mask bool [T, N] of each row's k largest scores; of equal ones the lower index."""
    rest = scores.detach()
    for _ in range(k):
        rest = rest.scatter(1, rest.max(1, keepdim=True).indices, -torch.inf)
    return rest == -torch.inf


def softmax(logits: Tensor) -> Tensor:
    """Softmax over the experts. On a CPU torch processes narrow rows one by one; over the columns
    of the transpose it is seven times faster for four experts."""
    if logits.device.type == "cpu" and logits.shape[1] <= 16:
        return logits.t().softmax(0).t()
    return logits.softmax(1)


def token_positions(
    length: int, *, tp: tuple[int, int] = (0, 1), cp: tuple[int, int] = (0, 1)
) -> Tensor:
    """Positions [length] in the whole sequence of the tokens that a rank routes.

    ``tp`` and ``cp`` are (rank, size). Context parallelism cuts a sequence into 2 x size chunks and
    gives rank r the chunks r and 2 x size - 1 - r; sequence parallelism slices those again.
    """
    place = torch.arange(length) + tp[0] * length
    if cp[1] == 1:
        return place
    chunk = length * tp[1] // 2
    return place + torch.where(place < chunk, cp[0], 2 * cp[1] - 2 - cp[0]) * chunk
