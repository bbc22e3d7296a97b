"""How evenly experts are used, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_btx.evaluate import routing_stats


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
def test_of_a_layer(experts: int) -> None:
    shares = np.random.default_rng(experts).dirichlet([0.3] * experts)
    found = routing_stats.of_layer(shares.tolist())
    use = shares * experts
    wanted = np.percentile(use, [0, 25, 50, 75, 100])
    names = ("min", "p25", "median", "p75", "max")
    assert [found[f"expert_utilization_{name}"] for name in names] == pytest.approx(wanted)
    assert found["cv"] == pytest.approx(use.std() / use.mean())
    entropy = -(shares * np.log(shares)).sum()
    assert found["expert_diversity"] == pytest.approx(np.exp(entropy) / experts)
    assert found["dead_expert_frac"] == pytest.approx((shares < 0.01).mean())


def test_even_and_collapsed() -> None:
    even = routing_stats.of_layer([0.25] * 4)
    assert even["expert_diversity"] == pytest.approx(1)
    assert (even["cv"], even["dead_expert_frac"]) == (0, 0)
    one = routing_stats.of_layer([1.0, 0, 0, 0])
    assert one["expert_diversity"] == pytest.approx(0.25)
    assert one["dead_expert_frac"] == 0.75
    assert routing_stats.of_layer([0.0, 0.0]) == {}


def test_means_over_texts_and_layers() -> None:
    load = {"a": [[0.5, 0.5], [1.0, 0.0]], "b": [[0.5, 0.5], [0.5, 0.5]]}
    found = routing_stats.of_load(load)
    assert found["moe/dead_expert_frac_mean"] == pytest.approx(0.5 / 4)
    assert found["moe/cv_mean"] == pytest.approx(1 / 4)
    assert found["moe/expert_utilization_max"] == pytest.approx((1 + 2 + 1 + 1) / 4)
    assert routing_stats.by_layer(load)["a"][1]["expert_utilization_max"] == 2.0
