"""Checkpoints that are taken instead of trained: what is refused, and the link that is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import import_checkpoint
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe
from tests.pipeline.conftest import TINY


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
        ("no manifest", "has no manifest.json"),
        ("damaged", "is damaged"),
        ("half", "is not whole"),
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
