"""Which rank holds the others up."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from megatron_btx.train.metrics import record_of
from megatron_btx.train.slow_ranks import compared
from megatron_btx.train.summary import slow_in_words
from tests.ranks import Ranks


def test_one_that_works_longer_than_the_median_is_named() -> None:
    found = compared([0.10, 0.11, 0.31, 0.09], ["n1", "n1", "n2", "n2"])
    assert found["slow_ranks"] == {"2@n2": pytest.approx(3.1)}
    assert found["time_metrics/rank_work_median(s)"] == 0.10
    assert found["time_metrics/rank_work_max(s)"] == 0.31
    words = "rank 2 on n2 works 3.1 times as long as the median rank"
    assert slow_in_words(found["slow_ranks"]) == words
    assert compared([0.1, 0.2], ["n1", "n2"])["slow_ranks"] == {"1@n2": 2.0}  # of two
    assert compared([0.1, 0.2], ["n1", "n2"], steps=20)["slow_ranks"] == {}
    assert compared([0.1, 0.14], ["n1", "n2"])["slow_ranks"] == {}
    assert compared([0.002, 0.004, 0.002, 0.1], ["n"] * 4)["slow_ranks"].keys() == {"3@n"}
    assert slow_in_words({}) == ""
    for record in ({"slow_ranks": {}}, {"slow_ranks": {"1@n2": 2.0}}):
        line = json.dumps({"kind": "train", "step": 10, **record}).encode()
        assert record_of(line)
    with pytest.raises(ValueError, match="slow_ranks"):
        record_of(b'{"kind": "train", "step": 10, "slow_ranks": [2.0]}')


def steps(seconds: float) -> list[dict[str, Any]]:
    """Made-up steps, as many as are looked at, in which the last rank works and the others wait for
    it."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist

    from megatron_btx.engine import distributed
    from megatron_btx.recipe.schema import Layout
    from megatron_btx.train import throughput
    from megatron_btx.train.slow_ranks import OVER, SlowRanks

    distributed.initialize(Layout(data_parallel_size=4), 0)
    listener, records = SlowRanks(), []
    for step in range(1, OVER + 1):
        started = time.perf_counter()
        with throughput.waiting_counted() as waited:
            time.sleep(seconds if dist.get_rank() == 3 else 0.001)
            dist.all_reduce(torch.ones(4))
            with dist._coalescing_manager(async_ops=False):
                dist.all_reduce(torch.ones(4))
                dist.all_reduce(torch.ones(4))
        record = {"time_metrics/work(s)": time.perf_counter() - started - waited.seconds}
        listener.after_step(SimpleNamespace(step=step), record)  # type: ignore[arg-type]
        records.append(record)
    return records


def test_waiting_is_no_work(ranks: Ranks) -> None:
    """All four take as long as the slowest; only it has worked."""
    everywhere = ranks.run(steps, 4, 0.1)
    looks = [record for record in everywhere[0] if "slow_ranks" in record]
    assert looks == everywhere[0][9::10]
    assert [look["slow_ranks"] for look in looks[:2]] == [{}, {}], "too few steps to tell"
    assert "3" in {name.partition("@")[0] for name in looks[2]["slow_ranks"]}
    assert looks[2]["slow_ranks"] == everywhere[3][-1]["slow_ranks"]
    assert looks[2]["time_metrics/rank_work_max(s)"] >= 0.1
