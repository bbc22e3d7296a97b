"""Every recipe in examples/ parses and plans; the paper's own run has the paper's figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.cli.main import main
from megatron_btx.pipeline import graph
from megatron_btx.recipe import chips, run_plan
from megatron_btx.recipe.load import dump, load_recipe, parse_recipe
from megatron_btx.recipe.schema import TokenizerBlock

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = sorted(set(EXAMPLES.rglob("*.yaml")) - {EXAMPLES / "from_huggingface" / "model.yaml"})
"""That one is what a command prints, for a recipe to begin from."""


def test_the_example_of_8b_fits_its_gpus() -> None:
    """With Llama 3's vocabulary, which a plan knows when the seed is there."""
    recipe = load_recipe(EXAMPLES / "from_huggingface" / "llama_8b.yaml")
    whole = replace(recipe, tokenizer=TokenizerBlock(vocab_size=128_256))
    made = run_plan.plan(whole)
    assert not list(chips.too_large(made, "h100"))
    assert list(chips.too_large(made, "a10"))
    (finetune,) = (stage for stage in made.stages if stage.name == "finetune")
    assert finetune.ranks == 16
    assert (
        finetune.params_total == 24_942_219_264
    )  # 8,030,261,248, Llama 3.1 8B, and three feed-forwards more


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_examples_parse_plan_and_round_trip(path: Path) -> None:
    recipe = load_recipe(path)
    assert parse_recipe(dump(recipe)) == recipe
    made = run_plan.plan(recipe)
    text = run_plan.render(made)
    for stage in made.stages:
        assert stage.name in text
        assert stage.memory_per_rank.allocated < stage.memory_per_rank.resident
    assert json.loads(run_plan.as_json(made))["recipe"] == recipe.name


def test_the_readmes_recipe_loads_and_plans(tmp_path: Path) -> None:
    """And the block that README goes on to show, on top of it."""
    first, more = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:2]
    (tmp_path / "mine.yaml").write_text(first)
    (tmp_path / "more.yaml").write_text(f"base: mine.yaml\n{more}")
    for name in ("mine.yaml", "more.yaml"):
        recipe = load_recipe(tmp_path / name)
        made = run_plan.plan(recipe)
        assert [stage.name for stage in made.stages][-1] == "dense"
        assert "finetune" in run_plan.render(made)
        others = ["prepare", "mix", "evaluate", "export", "report"]
        assert len(graph.build(recipe)) == len(made.stages) + len(others)
    assert recipe.finetune.megatron.transformer["recompute_granularity"] == "full"
    assert recipe.num_moe_experts == 4


def test_the_papers_run() -> None:
    """Section 4.1.1 and tables 3 and 4."""
    path = EXAMPLES / "paper_7b" / "recipe.yaml"
    made = run_plan.plan(load_recipe(path))
    stages = {stage.name: stage for stage in made.stages}
    table = run_plan.render(made).split("\n\n")[1]
    lines = {line.split()[0]: line.split() for line in table.splitlines()}
    assert lines["finetune"][1:4] == ["19.7B", "11.1B", "80.0B"]
    assert lines["seed"][1:3] == ["6.7B", "6.7B"]
    assert lines["expert:math"][3:5] == ["201.3B", "48,000"]
    assert lines["expert:code"][3:5] == ["209.7B", "50,000"]
    assert lines["expert:wikipedia"][3] == "42.0B"
    assert lines["dense"][3] == "533.0B"
    assert "533.0B tokens" in run_plan.render(made)
    assert stages["dense"].tokens == made.system_tokens
    assert stages["seed"].train_flops == 0
    assert {stage.ranks for stage in made.stages if stage.steps} == {128}
    text = path.read_text()
    for routing, active in (("switch", "6.7B"), ("soft", "19.7B")):
        changed = text.replace("type: topk", f"type: {routing}") + "export: {format: none}\n"
        other = run_plan.plan(parse_recipe(changed, path))
        row = next(line for line in run_plan.render(other).splitlines() if "finetune " in line)
        assert row.split()[2] == active


def test_disk_on_the_way() -> None:
    """A checkpoint every 8 steps, two kept: a third is whole before the first of them goes; the
    last of a stage has no optimizer."""
    made = run_plan.plan(load_recipe(EXAMPLES / "tiny" / "recipe.yaml"))
    stages = {stage.name: stage for stage in made.stages}
    whole, left = stages["seed"].checkpoint_bytes, stages["expert:math"].disk_bytes
    assert stages["seed"].peak_disk_bytes == 3 * whole  # 32 steps
    assert stages["expert:math"].peak_disk_bytes == 2 * whole + left  # 24 steps
    beside = 3 * stages["expert:math"].peak_disk_bytes + stages["dense"].peak_disk_bytes
    assert made.peak_disk_bytes == stages["seed"].disk_bytes + beside
    assert made.total_disk_bytes == sum(stage.disk_bytes for stage in made.stages)
    assert run_plan.peak_disk(stages[name] for name in ("seed",)) == 3 * whole
    assert run_plan.peak_disk(()) == 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "tiny" / "recipe.yaml"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in printed["stages"]] == [
        *("seed", "expert:code", "expert:math", "expert:prose", "finetune", "dense")
    ]


def test_missing_paths_are_one_warning_a_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's recipe names 22 paths that are nobody's; JSON has all of them."""
    assert main(["plan", str(EXAMPLES / "paper_7b" / "recipe.yaml"), "--json"]) == 0
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1] for line in warnings] == [
        "domains.algebraic_stack.train",
        "seed.from",  # of another kind: it may be a model of the Hub
    ]
    assert "\n  and 20 more like it: domains.algebraic_stack.valid (/" in said.err
    bad = json.loads(said.out)["bad_paths"]
    assert len(bad) == 22
    assert {one["what"] for one in bad} == {"does not exist"}


def test_planning_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_btx.recipe import run_plan, load; "
        f"run_plan.render(run_plan.plan(load.load_recipe({str(RECIPES[0])!r}))); "
        "print(sorted({'torch', 'numpy', 'megatron.core'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
