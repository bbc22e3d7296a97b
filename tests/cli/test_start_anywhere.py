"""A run that takes a seed and an expert from another run instead of training them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.recipe.load import load_recipe
from megatron_btx.train.metrics import read
from tests.small import Exported, btx


def test_the_imported_seed_computes_what_it_computed(exported: Exported, taken: Path) -> None:
    theirs = {
        stage: [r for r in read(exported.run_dir / stage / "metrics.jsonl") if r["kind"] == "eval"]
        for stage in ("seed", "expert-math")
    }
    ours = json.loads((taken / "results.json").read_text())["systems"]
    for stage, system in (("seed", "seed"), ("expert-math", "expert:math")):
        # Both fp32; under TP2 the sums are made in another order.
        assert ours[system]["loss"] == pytest.approx(theirs[stage][-1]["loss"], abs=1e-5)
    assert ours["btx"]["loss"]["mean"] < ours["seed"]["loss"]["mean"]


def test_their_tokenizer_comes_along(exported: Exported, taken: Path) -> None:
    model = "prepare/tokenizer/tokenizer.model"
    assert (taken / model).read_bytes() == (exported.run_dir / model).read_bytes()


def test_the_plan_knows_their_vocabulary(taken: Path) -> None:
    recipe = load_recipe(taken.parent.parent / "recipe.yaml")
    manifest = json.loads(next(taken.glob("seed/checkpoints/*/manifest.json")).read_text())
    assert recipe.tokenizer.vocab_size == manifest["vocab_size"] == 400


def test_nothing_is_trained_or_copied(exported: Exported, taken: Path) -> None:
    for stage in ("seed", "expert-math"):
        assert not (taken / stage / "metrics.jsonl").exists()
        (link,) = (taken / stage / "checkpoints").iterdir()
        assert link.is_symlink()
        assert link.resolve().parent.parent == exported.run_dir.resolve() / stage
    lineage = json.loads(
        next((taken / "finetune" / "checkpoints").glob("*/manifest.json")).read_text()
    )["lineage"]
    assert len(lineage["sources"]) == 2


def test_again_all_is_done(taken: Path) -> None:
    done = btx("run", "recipe.yaml", cwd=taken.parent.parent)
    assert done.returncode == 0
    assert "stages are done" in done.stdout
