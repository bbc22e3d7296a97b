"""Routing noise: its bits, its statistics, and that it belongs to the token."""

from __future__ import annotations

import itertools

import pytest
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megatron_btx.engine.moe import noise
from megatron_btx.engine.moe.noise import RoutingContext

EULER = 0.5772156649015329


def context(step: int, *sequences: int) -> RoutingContext:
    return RoutingContext(torch.tensor(step), torch.tensor(sequences))


def gumbel(
    sequences: list[int], positions: list[int], *, seed: int = 1, step: int = 5, layer: int = 2
) -> Tensor:
    key = noise.layer_key(seed, layer)
    return noise.gumbel(key, context(step, *sequences), torch.tensor(positions), 4)


def splitmix64(state: int, number: int) -> int:
    """Output ``number`` (from 0) of the generator as published, in Python's integers."""
    mask = (1 << 64) - 1
    z = (state + (number + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_bits_are_splitmix64() -> None:
    # The first outputs for seed 1234567, as commonly published for checking implementations.
    assert [splitmix64(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]
    for state, number in itertools.product((0, 1234567, 2**63 - 1), (0, 1, 999, 2**40)):
        ours = noise._next(torch.tensor(state), torch.tensor(number))
        assert int(ours) % 2**64 == splitmix64(state, number)


def test_noise_is_the_chain_of_its_keys() -> None:
    state = 0
    for word in (1, 2, 5, 1000, 77, 3):  # seed, layer, step, sequence, position, expert
        state = splitmix64(state, word)
    uniform = ((state >> 12) + 0.5) / 2**52
    expected = -torch.log(-torch.log(torch.tensor(uniform, dtype=torch.float64)))
    assert gumbel([1000], [77])[0, 0, 3] == expected


def test_noise_does_not_see_slices_batches_or_order() -> None:
    whole = gumbel([10, 11, 12], list(range(16)))
    assert torch.equal(gumbel([12, 10], list(range(16))), whole[:, [2, 0]])
    assert torch.equal(gumbel([11], list(range(8, 16))), whole[8:, [1]])
    assert torch.equal(gumbel([10, 11, 12], [3, 14, 0]), whole[[3, 14, 0]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and BTX_TEST_GPU=1")
def test_noise_does_not_see_the_device() -> None:
    positions, key = torch.arange(512), noise.layer_key(1, 2)
    here = noise.gumbel(key, context(5, 10, 2**40), positions, 8)
    there = noise.gumbel(key, context(5, 10, 2**40), positions.cuda(), 8).cpu()
    # The bits are equal; the logarithms are each device's own, to an ulp or two.
    torch.testing.assert_close(there, here, rtol=1e-14, atol=1e-14)


def test_every_key_counts() -> None:
    base = gumbel([10, 11], list(range(64)))
    others = {
        "seed": gumbel([10, 11], list(range(64)), seed=2),
        "step": gumbel([10, 11], list(range(64)), step=6),
        "layer": gumbel([10, 11], list(range(64)), layer=3),
        "sequence": gumbel([12, 13], list(range(64))),
        "position": gumbel([10, 11], list(range(64, 128))),
        "seed and layer exchanged": gumbel([10, 11], list(range(64)), seed=2, layer=1),
    }
    for name, other in others.items():
        assert not torch.isin(other, base).any(), name
    assert base.unique().numel() == base.numel()


def test_noise_is_standard_gumbel_and_uncorrelated() -> None:
    drawn = gumbel(list(range(40)), list(range(1000)))  # 160 000 numbers
    count = drawn.numel()
    # Mean Euler's constant, variance pi^2 / 6, fourth central moment 5.4 times its square.
    variance = torch.pi**2 / 6
    assert abs(float(drawn.mean()) - EULER) < 4.5 * (variance / count) ** 0.5
    assert abs(float(drawn.var()) - variance) < 4.5 * variance * (4.4 / count) ** 0.5
    # Kolmogorov-Smirnov against exp(-exp(-x)); 1.95 is its 0.1% point.
    cdf = torch.exp(-torch.exp(-drawn.flatten().sort().values))
    steps = torch.arange(count, dtype=torch.float64) / count
    assert (cdf - steps).abs().max() * count**0.5 < 1.95
    centred = drawn - drawn.mean()
    for shifted, plain in (
        (centred[1:], centred[:-1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[:, :, 1:], centred[:, :, :-1]),
    ):
        correlation = (shifted * plain).mean() / variance
        assert abs(float(correlation)) < 4.5 / shifted.numel() ** 0.5


def test_uniform_ends_are_finite() -> None:
    """The largest and the smallest uniform number that 52 bits make."""
    for bits in (0, 2**52 - 1):
        uniform = (torch.tensor(bits).double() + 0.5) * 2.0**-52
        assert 0 < float(uniform) < 1
        assert torch.isfinite(-torch.log(-torch.log(uniform)))


@pytest.fixture
def tracker() -> object:
    tracker = tensor_parallel.random.get_cuda_rng_tracker()
    states = tracker.get_states()
    tracker.set_states({})
    yield tracker
    tracker.set_states(states)


def test_context_lives_beside_megatrons_states(tracker: object) -> None:
    with pytest.raises(RuntimeError, match="set_routing_context"):
        noise.routing_context()
    mine = torch.zeros(8, dtype=torch.uint8)
    tracker.set_states({"model-parallel-rng": mine})  # type: ignore[attr-defined]
    noise.set_routing_context(3, torch.tensor([7, 9], dtype=torch.int32))
    noise.set_routing_context(torch.tensor(4), torch.tensor([8, 2**40]))
    step, sequences = noise.routing_context()
    assert (int(step), sequences.tolist()) == (4, [8, 2**40])
    assert tracker.get_states()["model-parallel-rng"] is mine  # type: ignore[attr-defined]


def test_recomputation_finds_the_context_of_its_forward_pass(tracker: object) -> None:
    """As in a pipeline: micro-batch 1 runs forward before micro-batch 0 runs backward."""
    seen: list[tuple[int, list[int]]] = []

    def layer(x: Tensor) -> Tensor:
        step, sequences = noise.routing_context()
        seen.append((int(step), sequences.tolist()))
        return x * 2

    outputs = []
    for first in (0, 2):
        noise.set_routing_context(9, torch.tensor([first, first + 1]))
        x = torch.ones(3, requires_grad=True)
        outputs.append(tensor_parallel.checkpoint(layer, False, x))
    for output in outputs:
        output.sum().backward()
    assert seen == [(9, [0, 1]), (9, [2, 3])] * 2
    assert noise.routing_context().sequences.tolist() == [2, 3]
