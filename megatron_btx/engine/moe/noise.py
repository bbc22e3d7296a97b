"""Routing noise that is a function of the token, not of a generator's state.

Sample Top-1 (section 3.3 of the paper) draws Gumbel noise for every token and expert. Here it is a
hash of (seed, layer, step, sequence, position, expert), so that a token has the same noise when its
layer is recomputed, on any tensor-parallel slice, in any micro-batch and pipeline order, and after
resuming. The bits come from integer arithmetic and are the same on any device.

``set_routing_context`` sets the step and sequences of a micro-batch before its forward pass. They
are kept among the states of Megatron's RNG tracker, which Megatron's activation checkpointing saves
and restores before it recomputes: the context is then right even if other micro-batches ran in
between."""

from __future__ import annotations

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

_STATE = "btx-routing-context"


def _int64(word: int) -> int:
    """The same 64 bits as torch's signed integer."""
    return word - (1 << 64) if word >> 63 else word


# SplitMix64 (Steele, Lea and Flood 2014): the golden-ratio increment and the two multipliers.
_INCREMENT = _int64(0x9E3779B97F4A7C15)
_MULTIPLY = (_int64(0xBF58476D1CE4E5B9), _int64(0x94D049BB133111EB))


class RoutingContext(NamedTuple):
    """Step [] and sequence ids [b] (a sample's index in the whole run) of a micro-batch, int64."""

    step: Tensor
    sequences: Tensor


def set_routing_context(step: int | Tensor, sequences: Tensor) -> None:
    """Set the micro-batch that comes next, on every rank that runs a part of it.

    Args:
        step: the optimizer step; it sets the temperature and keys the noise.
        sequences: int64 [b], the samples' indices in the run, in the order of the batch.
    """
    tracker = get_cuda_rng_tracker()
    step = torch.as_tensor(step, dtype=torch.int64, device=sequences.device)
    state = torch.cat([step.reshape(1), sequences.to(torch.int64)])
    tracker.set_states({**tracker.get_states(), _STATE: state})


def routing_context() -> RoutingContext:
    """The current micro-batch's step and sequences.

    Raises:
        RuntimeError: no context was set.
    """
    state = get_cuda_rng_tracker().get_states().get(_STATE)
    if state is None:
        raise RuntimeError(
            "this model's routing draws noise: call megatron_btx.engine.moe.noise."
            "set_routing_context(step, sequences) before each micro-batch's forward pass"
        )
    return RoutingContext(state[0], state[1:])


def layer_key(seed: int, layer_number: int) -> int:
    """The key of a layer's noise: 64 bits, signed. Layers count from 1."""
    return int(_next(_next(torch.tensor(0), torch.tensor(seed)), torch.tensor(layer_number)))


def gumbel(key: int, context: RoutingContext, positions: Tensor, num_experts: int) -> Tensor:
    """Standard Gumbel noise, float64 [s, b, N].

    Args:
        key: ``layer_key``.
        context: step and the b sequences.
        positions: int64 [s], positions within the sequence; its device is the noise's.
        num_experts: N.
    """
    device = positions.device
    bits = _next(context.step.to(device) * 0 + key, context.step.to(device))
    bits = _next(bits, context.sequences.to(device))  # [b]
    bits = _next(bits, positions.unsqueeze(1))  # [s, b]
    bits = _next(bits.unsqueeze(2), torch.arange(num_experts, device=device))  # [s, b, N]
    uniform = (_shift(bits, 12).double() + 0.5) * 2.0**-52  # exact, and never 0 or 1
    return -torch.log(-torch.log(uniform))


def _next(bits: Tensor, word: Tensor) -> Tensor:
    """Hash ``word`` into ``bits``: output number ``word`` of the SplitMix64 seeded with them."""
    bits = bits + (word + 1) * _INCREMENT
    bits = (bits ^ _shift(bits, 30)) * _MULTIPLY[0]
    bits = (bits ^ _shift(bits, 27)) * _MULTIPLY[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros, which torch's ``>>`` on signed integers does not."""
    return (bits >> count) & ((1 << (64 - count)) - 1)
