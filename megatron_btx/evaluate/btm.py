"""Branch-Train-Merge: whole models, whose next-token distributions are averaged.

Two ways to weigh them. Branch-Train-MiX's baseline (arXiv 2403.07816, sections 3.1 and 4.1.2) takes
the k models whose training text is most like the context (tf-idf) and averages them simply; BTM's
own paper (arXiv 2208.03306, section 2.2) weighs all by the posterior of their domains given the
prefix, ``p(D | x_<t) = p(x_<t | D) p(D) / sum_D' p(x_<t | D') p(D')``.

Averaged are probabilities: the weighted one of a label needs of each model no more than its own, so
that models can be run one after the other. Shapes: N models, S positions of a sequence; position t
stands for the prediction of token t + 1 from tokens 0 to t.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_btx.evaluate.tfidf import TfIdf

BtmMethod = Literal["top1", "top2", "posterior"]
Context = Literal["prefix", "document"]

TOP = {"top1": 1, "top2": 2}
EVERY = 32
"""Tokens after which the choice by tf-idf is made anew while a prefix grows."""

PRIOR_DECAY = 0.3
"""Of BTM's cached prior: the weight of the newest sequence in the running mean."""


def mixed(log_probs: Tensor, weights: Tensor) -> Tensor:
    """``log sum_j w_j p_j``, the log-probabilities of the weighted average of probabilities.

    Args:
        log_probs: [N, ...] of each model, nats.
        weights: likewise, or such that it broadcasts; they sum to 1 over N.

    Returns:
        [...] in at least fp32, over the largest term: no probability underflows.
    """
    log_probs = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    return torch.logsumexp(log_probs + weights.to(log_probs).log(), dim=0)


def posterior(log_probs: Tensor, prior: Tensor | None = None) -> Tensor:
    """The posterior of each model's domain, given the tokens before.

    Args:
        log_probs: [N, ..., S] of each label under each model, nats.
        prior: [N], sums to 1; ``None``: uniform.

    Returns:
        float64 [N, ..., S]: at position t the labels of positions 0 to t - 1 are known, and with
        them their likelihood under each model; at position 0 it is the prior.
    """
    double = log_probs.double()
    seen = double.cumsum(-1) - double
    if prior is not None:
        seen = seen + prior.double().log().view(-1, *[1] * (seen.dim() - 1))
    return torch.softmax(seen, dim=0)


def top_weights(similarity: np.ndarray, k: int) -> np.ndarray:
    """Weight 1 / k for the k most similar models, float64 like ``similarity`` [..., N].

    Ties go to the last model: as a recipe names them that is the seed, the generalist to which a
    context without a known word should go.
    """
    order = np.argsort(-similarity[..., ::-1], axis=-1, kind="stable")[..., :k]
    weights = np.zeros_like(similarity, dtype=np.float64)
    np.put_along_axis(weights, similarity.shape[-1] - 1 - order, 1 / k, axis=-1)
    return weights


def choice_points(length: int, every: int = EVERY) -> list[int]:
    """Positions at which the choice is made anew: 0, 1, 3, 7, ... (after 1, 2, 4, 8 tokens) while
    the prefix is shorter than ``every``, then whenever ``every`` more tokens are known."""
    points, known = [], 1
    while known <= length:
        points.append(known - 1)
        known = known * 2 if known < every else known + every
    return points


def chosen_weights(
    index: TfIdf,
    ids: Tensor,
    decode: Callable[[Sequence[int]], str],
    *,
    k: int,
    context: Context = "prefix",
    every: int = EVERY,
) -> Tensor:
    """The weights of the models for one sequence, by how like their text it is.

    Args:
        index: of the models' training text.
        ids: the sequence's tokens [S].
        decode: ids to text.
        k: how many models.
        context: ``prefix``: what is known at a position, chosen anew at ``choice_points``;
            ``document``: the whole sequence, once. That one looks ahead, by at most ln N nats a
            sequence: so much a choice among N can tell.
        every: see ``choice_points``.

    Returns:
        float64 [N, S].
    """
    length = len(ids)
    known = ids.tolist()
    points = [0] if context == "document" else choice_points(length, every)
    texts = [known] if context == "document" else [known[: point + 1] for point in points]
    similarity = np.stack([index.similarity(decode(text)) for text in texts])
    weights = torch.from_numpy(top_weights(similarity, k))
    spans = torch.tensor([*points[1:], length]) - torch.tensor(points)
    return weights.repeat_interleave(spans, dim=0).T.contiguous()


def cached_prior(log_probs: Tensor, decay: float = PRIOR_DECAY) -> Tensor:
    """The prior that BTM's own code keeps for a domain: the posteriors of some development text,
    started uniform, each sequence's mean entering a running mean with weight ``decay``.

    Args:
        log_probs: [N, sequences, S] on that text, nats.

    Returns:
        float64 [N].
    """
    means = posterior(log_probs).mean(-1)
    prior = means[:, 0]
    for sequence in range(1, means.shape[1]):
        prior = decay * means[:, sequence] + (1 - decay) * prior
    return prior


def named(weights: Tensor, names: Sequence[str]) -> Mapping[str, float]:
    """Mean weight by model, of weights [N, ...]."""
    means = weights.double().flatten(1).mean(1).tolist()
    return {name: round(value, 6) for name, value in zip(names, means, strict=True)}
