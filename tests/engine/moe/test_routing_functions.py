"""The routing functions against plain loops written from the paper's formulae, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from megatron_btx.engine.moe import noise, routing_functions

TOKENS, EXPERTS = 37, 5


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exponentials(row: list[float]) -> list[float]:
    return [math.exp(value) for value in row]


def paper_topk(row: list[float], k: int) -> list[float]:
    """SoftMax(TopK(W x)), section 3.2."""
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    total = sum(math.exp(row[i]) for i in best)
    return [math.exp(row[i]) / total if i in best else 0.0 for i in range(len(row))]


def paper_soft(row: list[float]) -> list[float]:
    return paper_topk(row, len(row))


def paper_switch(row: list[float]) -> list[float]:
    full = paper_soft(row)
    return [gate if gate == max(full) else 0.0 for gate in full]


def paper_sample(row: list[float], noise_row: list[float], tau: float) -> list[float]:
    """Gumbel-softmax, then everything but the largest entry zeroed (section 3.3)."""
    return paper_switch([(r + g) / tau for r, g in zip(row, noise_row, strict=True)])


def paper_balance(gates: list[list[float]], logits: list[list[float]], alpha: float) -> float:
    """alpha N sum_i u_i p_i, section 3.3."""
    tokens, experts, total = len(gates), len(gates[0]), 0.0
    for i in range(experts):
        u = sum(row[i] for row in gates) / tokens
        p = sum(paper_soft(row)[i] for row in logits) / tokens
        total += u * p
    return alpha * experts * total


LOGITS, NOISE = draw(0, TOKENS, EXPERTS), draw(1, TOKENS, EXPERTS)
ROUTES = {
    "topk": (lambda x: routing_functions.topk(x, 2), lambda row, _: paper_topk(row, 2)),
    "topk of all": (lambda x: routing_functions.topk(x, EXPERTS), lambda row, _: paper_soft(row)),
    "switch": (routing_functions.switch, lambda row, _: paper_switch(row)),
    "soft": (routing_functions.soft, lambda row, _: paper_soft(row)),
    "sample_top1": (
        lambda x: routing_functions.sample_top1(x, NOISE[: len(x), : x.shape[1]], 0.7),
        lambda row, noise_row: paper_sample(row, noise_row, 0.7),
    ),
}


@pytest.mark.parametrize("name", ROUTES)
def test_gates_are_the_papers(name: str) -> None:
    ours, paper = ROUTES[name]
    gates, routing_map = ours(LOGITS)
    expected = [paper(*rows) for rows in zip(LOGITS.tolist(), NOISE.tolist(), strict=True)]
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gates, exact, rtol=1e-12, atol=1e-15)
    assert torch.equal(routing_map, exact > 0)
    assert torch.equal(gates > 0, routing_map)


@pytest.mark.parametrize("experts", [5, 40])  # both ways to take a softmax
@pytest.mark.parametrize("k", [2, 3])
def test_topk_gates_sum_to_one(k: int, experts: int) -> None:
    gates, routing_map = routing_functions.topk(draw(3, 100, experts).float(), k)
    torch.testing.assert_close(gates.sum(1), torch.ones(100))
    assert torch.equal(routing_map.sum(1), torch.full((100,), k))


def test_equal_logits_go_to_the_lower_index() -> None:
    _, routing_map = routing_functions.topk(torch.zeros(3, 8), 2)
    assert routing_map.tolist() == [[True, True] + [False] * 6] * 3
    _, routing_map = routing_functions.topk(torch.tensor([[1.0, 2.0, 0.0, 2.0, 2.0]]), 2)
    assert routing_map.tolist() == [[False, True, False, True, False]]


@pytest.mark.parametrize("name", ROUTES)
def test_gradient_of_the_gates(name: str) -> None:
    logits = draw(4, 6, EXPERTS).requires_grad_()
    assert gradcheck(lambda x: ROUTES[name][0](x)[0], logits)


@pytest.mark.parametrize("name", ROUTES)
def test_balance_loss_is_the_papers_with_both_gradients(name: str) -> None:
    ours, paper = ROUTES[name]

    def loss(logits: Tensor) -> Tensor:
        u, p = ours(logits)[0].mean(0), routing_functions.softmax(logits).mean(0)
        return routing_functions.balance_loss(u, p, 0.03)

    rows = LOGITS.tolist()
    gates = [paper(*pair) for pair in zip(rows, NOISE.tolist(), strict=True)]
    assert float(loss(LOGITS)) == pytest.approx(paper_balance(gates, rows, 0.03), rel=1e-12)
    assert gradcheck(loss, draw(5, 6, EXPERTS).requires_grad_())
    u, p = draw(6, EXPERTS).requires_grad_(), draw(7, EXPERTS).requires_grad_()
    routing_functions.balance_loss(u, p, 0.03).backward()
    torch.testing.assert_close(u.grad, 0.03 * EXPERTS * p.detach())
    torch.testing.assert_close(p.grad, 0.03 * EXPERTS * u.detach())


def test_balance_loss_of_uniform_use_is_alpha() -> None:
    cycle = torch.stack([torch.tensor([2.0, 1.0, 0.5, -1.0]).roll(i) for i in range(4)])
    for gates, _ in (routing_functions.topk(cycle, 2), routing_functions.soft(cycle)):
        loss = routing_functions.balance_loss(
            gates.mean(0), routing_functions.softmax(cycle).mean(0), 0.01
        )
        assert float(loss) == pytest.approx(0.01, rel=1e-6)
    quarter = torch.full((4,), 0.25)
    assert float(routing_functions.balance_loss(quarter, quarter, 0.25)) == 0.25


def test_temperature_anneals_as_jang_et_al() -> None:
    def tau(step: int) -> float:
        return float(routing_functions.temperature(torch.tensor(step), 0.5, 1e-4))

    assert tau(0) == 1.0
    assert tau(3000) == pytest.approx(math.exp(-0.3), rel=1e-15)
    assert tau(6931) > 0.5
    assert tau(6932) == tau(50_000) == 0.5  # ln 2 / 1e-4 = 6931.5


def test_samples_follow_the_softmax() -> None:
    """Over many draws the chosen expert is distributed as softmax, in training at any temperature
    and at inference: within 4.5 standard deviations, with a fixed seed."""
    draws, logits = 100_000, torch.tensor([1.5, 0.0, -0.5, -2.0])
    context = noise.RoutingContext(torch.tensor(7), torch.arange(50))
    gumbel = noise.gumbel(noise.layer_key(11, 3), context, torch.arange(draws // 50), 4)
    gumbel, rows = gumbel.view(-1, 4), logits.expand(draws, 4).double()
    probabilities = logits.double().softmax(0)
    sigma = (probabilities * (1 - probabilities) / draws).sqrt()
    for gates, routing_map in (
        routing_functions.sample_top1(rows, gumbel, 0.5),
        routing_functions.sample_top1(rows, gumbel, 1.0),
        routing_functions.draw_top1(rows, gumbel),
    ):
        assert torch.equal(routing_map.sum(1), torch.ones(draws, dtype=torch.long))
        assert torch.equal(routing_map, gates > 0)
        deviation = (routing_map.double().mean(0) - probabilities) / sigma
        assert deviation.abs().max() < 4.5


def test_cooling_hardens_the_sample() -> None:
    means = [
        float(routing_functions.sample_top1(LOGITS, NOISE, t)[0].sum(1).mean())
        for t in (1, 0.5, 1e-4)
    ]
    assert means[0] < means[1] < means[2]
    assert means[2] == pytest.approx(1, abs=1e-6)


def test_inference_runs_one_expert_with_weight_one() -> None:
    for drawn, scores in ((None, LOGITS), (NOISE, LOGITS + NOISE)):
        gates, routing_map = routing_functions.draw_top1(LOGITS, drawn)
        assert torch.equal(routing_map.int().argmax(1), scores.argmax(1))
        assert torch.equal(gates, routing_map.double())
        assert torch.equal(gates.sum(1), torch.ones(TOKENS, dtype=torch.float64))


def test_forced_routing() -> None:
    gates, routing_map = routing_functions.forced(LOGITS, 4, 2)
    assert gates.dtype == LOGITS.dtype
    assert gates.tolist() == [[0, 0, 0, 0, 1]] * TOKENS
    assert routing_map.tolist() == [[True, False, False, False, True]] * TOKENS


def test_capacity() -> None:
    assert routing_functions.capacity(8, 4, 1.5) == 3
    assert routing_functions.capacity(9, 4, 1.5) == 4  # 3.375
    assert routing_functions.capacity(10, 4, 1.2) == 3


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_expert_keeps_its_first_tokens(ranks: int) -> None:
    """A plain queue over all tokens, against ranks that know only the counts before them."""
    limit, experts = 6, 3
    choices = torch.randint(experts, (40,), generator=torch.Generator().manual_seed(2))
    queue, kept = [0] * experts, []
    for choice in choices.tolist():
        queue[choice] += 1
        kept.append(queue[choice] <= limit)
    expected = torch.nn.functional.one_hot(choices, experts).bool() & torch.tensor(kept)[:, None]
    assert not all(kept)
    slices = torch.nn.functional.one_hot(choices, experts).bool().view(ranks, -1, experts)
    counts = slices.sum(1)
    ours = routing_functions.within_capacity(slices, counts.cumsum(0) - counts, limit)
    assert torch.equal(ours.view(-1, experts), expected)


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2), (2, 3)])
def test_positions_of_every_slice(tp: int, cp: int) -> None:
    length = 2 * tp * cp * 2
    chunks = torch.arange(length).chunk(2 * cp)
    seen = []
    for cp_rank in range(cp):
        whole = torch.cat([chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]])
        for tp_rank, part in enumerate(whole.chunk(tp)):
            ours = routing_functions.token_positions(len(part), tp=(tp_rank, tp), cp=(cp_rank, cp))
            assert torch.equal(ours, part)
            seen += ours.tolist()
    assert sorted(seen) == list(range(length))
