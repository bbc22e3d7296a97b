"""``btx plan --ranks``: a stage by rank, without its ranks. That a rank really reads the bytes that
are counted is held by tests/mix/test_live.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.engine.simulated_ranks import held
from megatron_btx.mix.btx import btx
from megatron_btx.pipeline import rank_plan
from megatron_btx.recipe import count, memory
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Training
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import Unread
from tests.engine.test_simulated_ranks import JOBS, job
from tests.pipeline.conftest import TINY
from tests.small import btx as run_btx


def _job(name: str) -> tuple[Training, Plan]:
    architecture, layout = job(name)
    dense = replace(architecture, experts=(), routing=None)
    tensors = {name: (shape, torch.bfloat16) for name, shape in canonical_tensors(dense).items()}
    models = [Checkpoint(one, None, dense, Unread(tensors)) for one in architecture.experts]
    assert architecture.routing is not None
    plan = btx(models, routing=architecture.routing, dtype=torch.bfloat16)
    training = Training(
        layout=layout, use_distributed_optimizer=True, tokens=10**10, global_batch_size=1024
    )
    return training, plan


@pytest.mark.parametrize("name", JOBS)
def test_a_thousand_ranks(name: str) -> None:
    training, plan = _job(name)
    architecture, layout = plan.architecture, training.layout
    found = rank_plan.of_stage("finetune", architecture, training, architecture.model, plan)
    assert found.ranks == layout.world_size
    assert found.built <= 24
    # Of every source all is needed: what is averaged, and the FFNs of its expert.
    dense = replace(architecture, experts=(), routing=None)
    parameters = count.parameters(dense)
    stored = 2 * (parameters.total - parameters.vocab_padding)
    assert found.bytes_needed == stored * len(architecture.experts)
    assert set(found.bytes_read_by_all) == set(architecture.experts)
    assert sum(found.bytes_read_by_all.values()) <= 1.01 * found.bytes_needed
    stages = range(layout.pipeline_model_parallel_size)
    planned = [sum(memory.rank_parameters(architecture, layout, stage)) for stage in stages]
    assert found.parameters == (min(planned), max(planned))
    states = [memory.stage_memory(architecture, training, stage).optimizer for stage in stages]
    assert found.optimizer_bytes == (min(states), max(states))
    assert found.files_without_optimizer < found.files == layout.world_size
    assert "1.00 times what is needed once" in found.render()


def test_a_copy_reads_what_the_rank_itself_would() -> None:
    """Ranks beyond the first of a stage, which are not built."""
    training, plan = _job("8 x 7B, TP2 x EP8 x DP256")
    built = [held(plan.architecture, training, at, plan) for at in range(8)]
    every = rank_plan.reading(built, 512)
    assert len(every) == 512
    for number in (8, 9, 77, 511):
        assert held(plan.architecture, training, number, plan).read() == every[number]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_btx("plan", TINY, "--ranks", cwd=tmp_path)  # where nothing was imported before
    assert (done.returncode, done.stderr) == (0, "")
    assert "finetune: 2 ranks, 2 built" in done.stdout
    assert main(["plan", str(TINY), "--ranks", "--json"]) == 0
    by_rank = {one["stage"]: one for one in json.loads(capsys.readouterr().out)["by_rank"]}
    assert by_rank["seed"]["bytes_needed"] == 0
    mixed = by_rank["finetune"]
    assert sum(mixed["bytes_read_by_all"].values()) == mixed["bytes_needed"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "experts: {math: {from: /nowhere, tokens: 0}}",
            "experts.math.from: /nowhere is not there",
        ),
        ("mix: {ties: 0.2}", "mix: needs thresholds"),
    ],
)
def test_what_is_not_known_is_refused(
    more: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\n{more}\n")
    assert main(["plan", str(recipe), "--ranks"]) == 2
    assert said in capsys.readouterr().err
