"""The plan's bytes against a run's: parameters exactly, memory within 10%, disk within 5%."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.recipe import check, count, memory
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout, MegatronOptions, Model, Routing, Training

DEMO = Path(__file__).parents[2] / "examples" / "demo" / "recipe.yaml"


@pytest.mark.parametrize("stage", ["seed", "finetune"])
def test_a_demo_stage(stage: str, tmp_path: Path) -> None:
    out = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure.py")), str(DEMO), stage, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=180,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    measured = json.loads(out.stdout.splitlines()[-1])
    recipe = load_recipe(DEMO)
    training = replace(check.stages(recipe)[stage], layout=Layout())
    architecture = count.dense_architecture(recipe)
    if stage == "finetune":
        architecture = architecture.mixed(recipe)
    assert measured["parameters"] == count.parameters(architecture).total
    planned = memory.training_memory(architecture, training).resident
    assert planned == pytest.approx(measured["peak"], rel=0.10)
    disk = memory.checkpoint_bytes(architecture, training)
    assert disk == pytest.approx(measured["disk"], rel=0.05)


MODEL = Model(
    num_layers=4, hidden_size=64, ffn_hidden_size=128, num_attention_heads=8, seq_length=128
)
DENSE = Architecture(model=MODEL, vocab_size=500)
MOE = replace(DENSE, experts=("a", "b", "c", "d"), routing=Routing())


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tensor_model_parallel_size=2),
        Layout(pipeline_model_parallel_size=2),
        Layout(data_parallel_size=4, expert_model_parallel_size=4),
        Layout(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            data_parallel_size=2,
            expert_model_parallel_size=2,
        ),
    ],
)
@pytest.mark.parametrize("architecture", [DENSE, MOE], ids=["dense", "moe"])
def test_the_shards_add_up_to_the_model(architecture: Architecture, layout: Layout) -> None:
    tp, ep, etp = layout.tensor_model_parallel_size, layout.expert_model_parallel_size, layout.etp
    if not architecture.experts:
        ep = etp = 1
    shards = [
        memory.rank_parameters(architecture, layout, stage)
        for stage in range(layout.pipeline_model_parallel_size)
    ]
    counted = count.parameters(architecture)
    replicated = counted.norms + counted.router
    dense = sum(dense for dense, _ in shards)
    assert (dense - replicated) * tp + replicated + sum(e for _, e in shards) * ep * etp == (
        counted.total
    )


def test_what_shrinks_what() -> None:
    plain = Training(global_batch_size=8, micro_batch_size=2, layout=Layout(data_parallel_size=4))
    base = memory.training_memory(DENSE, plain)
    sharded = memory.training_memory(DENSE, replace(plain, use_distributed_optimizer=True))
    assert sharded.optimizer == pytest.approx(base.optimizer / 4, rel=0.01)
    assert sharded.weights == base.weights
    full = {"recompute_granularity": "full", "recompute_num_layers": 1}
    options = MegatronOptions(transformer={**full, "recompute_method": "uniform"})
    recomputed = memory.training_memory(DENSE, replace(plain, megatron=options))
    assert recomputed.activations < base.activations / 4
    fp32 = memory.training_memory(DENSE, replace(plain, precision="fp32"))
    assert fp32.activations == 2 * base.activations
    assert fp32.optimizer == base.optimizer * 8 / 12
