"""Checkpoints that are taken instead of trained: what is refused, and the link that is left."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.mix.one_model import fresh
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.weights.manifest import read_manifest
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.source import read_whole
from tests.pipeline.conftest import TINY
from tests.weights.test_megatron_lm_args import ARGS, megatron_lm


def _checkpoint(path: Path, recipe: Recipe, **changes: object) -> Path:
    """A directory that says it is a checkpoint of ``recipe``'s model."""
    path.mkdir(parents=True)
    architecture = Architecture(model=recipe.model, vocab_size=512)
    manifest = {"format": "megatron_btx/1", "step": 7, **architecture.to_json(), **changes}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / ".metadata").write_bytes(b"x")
    return path


def _taking(path: Path) -> Recipe:
    recipe = load_recipe(TINY)
    return dataclasses.replace(recipe, seed=dataclasses.replace(recipe.seed, from_=str(path)))


def test_a_fitting_checkpoint_passes(tmp_path: Path) -> None:
    recipe = load_recipe(TINY)
    path = _checkpoint(tmp_path / "seed" / "checkpoints" / "step_00000007", recipe)
    for given in (path, path.parent, path.parent.parent):
        import_checkpoint.check(_taking(given), "seed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "does not exist"),
        ("no manifest", "truncated or corrupt"),
        ("damaged", "is damaged"),
        ("half", "is incomplete"),
        ("moe", "is a mixture of experts"),
        ("shape", r"hidden_size: 64 there, 32 here"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: str, message: str) -> None:
    recipe = load_recipe(TINY)
    path = tmp_path / "step_00000007"
    if change != "missing":
        _checkpoint(path, recipe)
    manifest = path / "manifest.json"
    if change == "no manifest":
        manifest.unlink()
    elif change == "damaged":
        manifest.write_text("{")
    elif change == "half":
        (path / ".metadata").unlink()
    elif change == "moe":
        moe = {"experts": ["a", "b"], "routing": dataclasses.asdict(recipe.routing)}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "moe": moe}))
    elif change == "shape":
        model = dataclasses.asdict(dataclasses.replace(recipe.model, hidden_size=64))
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "model": model}))
    with pytest.raises(UserError, match=message) as error:
        import_checkpoint.check(_taking(path), "seed")
    assert error.value.where == "seed.from"
    assert error.value.fix


def test_an_expert_of_zero_tokens_is_a_link_to_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(TINY)
    math = dataclasses.replace(recipe.experts["math"], tokens=0)
    recipe = dataclasses.replace(recipe, experts={**recipe.experts, "math": math})
    seed = _checkpoint(tmp_path / "run" / "seed" / "checkpoints" / "step_00000032", recipe, step=32)
    monkeypatch.setattr(
        import_checkpoint, "_whole", lambda directory: None
    )  # no tensors in this one
    import_checkpoint.link(recipe, "expert:math", tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    link = moved / "expert-math" / "checkpoints" / "step_00000032"
    assert link.is_symlink()
    assert link.resolve() == (moved / seed.relative_to(tmp_path / "run")).resolve()


def _of_megatron_lm(path: Path, recipe: Recipe, **said: object) -> Recipe:
    """A step directory as Megatron-LM leaves one, and the recipe that takes it as its seed."""
    architecture = Architecture(model=recipe.model, vocab_size=512)
    args = {
        **ARGS,
        **dataclasses.asdict(recipe.model),
        "use_rope_scaling": recipe.model.rope_scaling,
        "vocab_size": 512,
        **said,
    }
    plan = fresh(architecture, seed=1, dtype=torch.float32)
    megatron_lm(path, argparse.Namespace(**args), plan)
    return dataclasses.replace(recipe, seed=dataclasses.replace(recipe.seed, from_=str(path)))


def test_another_trainers_checkpoint_becomes_ours(tmp_path: Path) -> None:
    """Its factor, which that trainer may have dropped, is the recipe's."""
    recipe = load_recipe(TINY)
    model = dataclasses.replace(recipe.model, rope_scaling=True, rope_scaling_factor=32.0)
    recipe = _of_megatron_lm(tmp_path / "iter", dataclasses.replace(recipe, model=model))
    left = [stage for stage in graph.outline(recipe) if stage.name == "seed"]
    with pytest.raises(UserError, match="comes without its tokenizer"):
        import_checkpoint.check_all(recipe, left)
    made = tmp_path / "run" / import_checkpoint.link(recipe, "seed", tmp_path / "run")["checkpoint"]
    assert read_manifest(made)[0] == Architecture(model=model, vocab_size=512)
    assert read_manifest(made)[1]["tokens"] == 1000 * model.seq_length
    theirs = open_megatron(tmp_path / "iter", "m", {"rope_scaling_factor": 32.0})
    ours = open_megatron(made, "m")
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name in ours.tensors:
        assert torch.equal(read_whole(theirs.source, name), read_whole(ours.source, name)), name


def test_a_plan_and_a_dry_run_look_at_what_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plan warns of what the run will refuse."""
    _of_megatron_lm(tmp_path / "iter", load_recipe(TINY))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {TINY}\nmodel: {{num_layers: 3}}\nseed: {{from: iter}}\n")
    assert main(["plan", str(recipe)]) == 0
    assert "is of another model (num_layers: 2 there, 3 here)" in capsys.readouterr().err
    assert main(["run", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "is of another model (num_layers: 2 there, 3 here)" in said.err
    assert "not started" in said.out


def test_another_vocabulary_than_the_recipes_is_refused(tmp_path: Path) -> None:
    recipe = _of_megatron_lm(tmp_path / "iter", load_recipe(TINY), vocab_size=500)
    with pytest.raises(UserError, match="has a vocabulary of 500, the recipe one of 512") as error:
        import_checkpoint.check(recipe, "seed")
    assert error.value.fix == "set `tokenizer: {vocab_size: 500}`"


def test_a_vocabulary_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    recipe = _of_megatron_lm(tmp_path / "iter", load_recipe(TINY), vocab_size=None)
    with pytest.raises(UserError, match="does not say vocab_size") as error:
        import_checkpoint.check(recipe, "seed")
    assert error.value.fix.startswith("give the tokenizer, or say it under `model:` in a file")
