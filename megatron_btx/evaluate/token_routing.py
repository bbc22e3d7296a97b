"""Which experts an MoE takes for each token of a text, and with which gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_btx.engine.moe.router import collect_gates
from megatron_btx.errors import UserError
from megatron_btx.evaluate.predictor import NO_PROGRESS, Predictor, ScoredText


def route(
    predictor: Predictor, texts: Sequence[str], progress: Callable[[float], None] = NO_PROGRESS
) -> dict[str, Any]:
    """The routing of texts, token by token. Every rank calls it and gets the same.

    Args:
        predictor: of an MoE.
        texts: each begins with the begin token, as in every evaluation; of one that is longer than
            the model's context the end is left out.
        progress: told how much is done.

    Returns:
        ``{"experts": names, "texts": [{"tokens": [text of the token], "gates": [layer][token]
        {expert: gate}, "cut": tokens left out}]}``; experts from the largest gate down.

    Raises:
        UserError: the model has no experts.
    """
    (live,) = predictor.members.values()
    experts = live.architecture.experts
    if not experts:
        raise UserError(
            predictor.subject.name, "is a dense model: it routes nothing", "give an MoE"
        )
    found = []
    for number, text in enumerate(texts):
        whole = [predictor.start_id, *predictor.encode(text)]
        ids = tuple(whole[: predictor.seq_length])
        gates = _gates(predictor, ScoredText(ids, first=1, number=number))
        chosen = [[_chosen(experts, token) for token in layer] for layer in gates.tolist()]
        tokens = [_text(predictor, ids, place) for place in range(len(ids))]
        found.append({"tokens": tokens, "gates": chosen, "cut": len(whole) - len(ids)})
        progress((number + 1) / len(texts))
    return {"experts": list(experts), "texts": found}


def _gates(predictor: Predictor, row: ScoredText) -> Tensor:
    """[layers, tokens, experts] of a text."""
    (live,) = predictor.members.values()
    filled = predictor.seq_length + predictor.layout.tensor_model_parallel_size
    with collect_gates(live.module, filled) as gates:
        predictor.next([row])  # on every data-parallel rank: it fills up what it has no row for
        dist.all_reduce(gates)
    return gates[:, : len(row.ids)] / parallel_state.get_data_parallel_world_size()


def _chosen(experts: Sequence[str], gates: Sequence[float]) -> dict[str, float]:
    named = sorted(zip(experts, gates, strict=True), key=lambda one: -one[1])
    return {expert: round(gate, 6) for expert, gate in named if gate > 0}


_BEFORE = 8
"""Tokens decoded together with one: alone, some tokenizers drop its space, or a part of a
character."""


def _text(predictor: Predictor, ids: Sequence[int], place: int) -> str:
    """Of one token; empty of one that is not decoded, such as the begin token."""
    decode = predictor.tokenizer.decode
    before = list(ids[max(0, place - _BEFORE) : place])
    return decode([*before, ids[place]])[len(decode(before)) :]
