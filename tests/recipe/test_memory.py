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


WIDE = """
model: {num_layers: 2, hidden_size: 512, ffn_hidden_size: 1408, num_attention_heads: 8,
  num_query_groups: 8, seq_length: 256}
tokenizer: {vocab_size: 8192}
"""
ONE = "data_parallel_size: 1"
EP1 = ONE + ", expert_model_parallel_size: 1"
EP2 = "data_parallel_size: 2, expert_model_parallel_size: 2"
CASES = {
    "the demo's seed": ("", "seed", ONE, "fp32"),
    "the demo's MoE on two ranks": ("", "finetune", EP2, "bf16"),
    "the demo's MoE on one rank": ("", "finetune", EP1, "fp32"),
    "hidden 512, TP2": (WIDE, "seed", ONE + ", tensor_model_parallel_size: 2", "bf16"),
    "hidden 512, MoE": (WIDE, "finetune", EP1, "bf16"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stage(case: str, tmp_path: Path) -> None:
    text, stage, layout, precision = CASES[case]
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"base: {DEMO}\nname: measured\n{text}\n{stage}: {{layout: {{{layout}}}}}\n"
        f"training: {{precision: {precision}, micro_batch_size: 4}}\n"
    )
    recipe = load_recipe(file)
    training = check.stages(recipe)[stage]
    architecture = count.dense_architecture(recipe)
    if stage == "finetune":
        architecture = architecture.mixed(recipe)
    measured = run_ranks(file, stage, training.layout.world_size, tmp_path)
    held = sum(one["parameters"] for one in measured)
    shards = [memory.rank_parameters(architecture, training.layout, 0)] * len(measured)
    assert held == sum(map(sum, shards))
    largest = max(measured, key=lambda one: one["peak"])
    # Apart from the interpreter, of which 13 MiB come and go with cached bytecode.
    planned = memory.training_memory(architecture, training).resident - memory.runtime()
    trained = largest["peak"] - largest["runtime"]
    assert planned == pytest.approx(trained, abs=0.10 * largest["peak"])
    assert memory.runtime() == pytest.approx(largest["runtime"], rel=0.25)
    disk = memory.checkpoint_bytes(architecture, training)
    assert disk == pytest.approx(measured[0]["disk"], rel=0.05)


def run_ranks(file: Path, stage: str, ranks: int, folder: Path) -> list[dict[str, int]]:
    """What each rank of the stage's layout measured."""
    command = [sys.executable, str(Path(__file__).with_name("measure.py")), str(file), stage]
    environment = {name: text for name, text in os.environ.items() if "MALLOC" not in name} | {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "BTX_INIT_METHOD": f"file://{folder}/rendezvous",
    }
    running = [
        subprocess.Popen(
            [*command, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        written = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    for process, (_, errors) in zip(running, written, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in written]


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


def test_an_asynchronous_save_takes_a_second_copy_of_what_it_saves() -> None:
    plain = memory.training_memory(DENSE, Training())
    beside = memory.training_memory(DENSE, Training(async_save=True))
    assert plain.saving == 0
    assert beside.saving == plain.weights + plain.optimizer
    assert beside.resident == plain.resident + beside.saving
    assert beside.allocated == plain.allocated
