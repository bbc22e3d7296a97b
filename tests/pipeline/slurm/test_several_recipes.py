"""Who submits what of several recipes; no Slurm is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph
from megatron_btx.pipeline.slurm import several_recipes
from megatron_btx.pipeline.slurm.several_recipes import Member
from megatron_btx.recipe.load import load_recipe
from tests.bad import Commands

SYSTEMS = ("dense", "btm", "btx")


@pytest.fixture
def members(small: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Member]:
    """Three systems of the small recipe."""
    monkeypatch.chdir(tmp_path)
    found = []
    base = tmp_path / "recipe.yaml"
    base.write_text(base.read_text() + "dense: {}\n")
    for system in SYSTEMS:
        path = tmp_path / f"{system}.yaml"
        path.write_text(f"base: recipe.yaml\nname: {system}\nsystem: {system}\n")
        recipe = load_recipe(path)
        run_dir = Path(recipe.run_dir).absolute()
        found.append(Member(recipe=recipe, run_dir=run_dir, stages=graph.build(recipe)))
    return found


def test_each_stage_is_submitted_by_the_first_that_has_it(members: list[Member]) -> None:
    dense, btm, btx = several_recipes.arrange(members)
    names = [[stage.name for stage in member.chosen] for member in (dense, btm, btx)]
    assert names == [
        ["prepare", "seed", "dense", "evaluate", "report"],
        ["expert:math", "evaluate", "report"],
        ["mix", "finetune", "evaluate", "report"],
    ]
    assert btm.taken == {"prepare": dense.run_dir, "seed": dense.run_dir}
    assert btx.taken == {**btm.taken, "expert:math": btm.run_dir, "dense": dense.run_dir}


def test_links_are_made_before_there_is_anything_in_them(members: list[Member]) -> None:
    _, btm, _ = several_recipes.arrange(members)
    btm.run_dir.mkdir(parents=True)
    for _ in range(2):  # as often as it is submitted
        several_recipes.link(btm)
        assert (btm.run_dir / "seed").readlink() == Path("../dense/seed")
    (btm.run_dir / "seed").unlink()
    (btm.run_dir / "seed").mkdir()
    with pytest.raises(UserError, match="already holds a stage"):
        several_recipes.link(btm)


def test_a_value_of_the_recipe_runs_no_command(members: list[Member], tmp_path: Path) -> None:
    out = tmp_path / "it's $(touch hit)"
    text = several_recipes.compare_script(several_recipes.arrange(members), out)
    assert "/it'\"'\"'s $(touch hit)'" in text
    assert text.count("recipe.yaml'") == 3


def test_the_command_tells_it(small: Commands, members: list[Member], tmp_path: Path) -> None:
    files = [str(tmp_path / f"{system}.yaml") for system in SYSTEMS]
    done = small("submit", *files, "--dry-run")
    assert done.code == 0, done.stderr
    assert done.stdout.count("seed  that of dense") == 2
    assert "compare of 3 runs" in done.stdout
    assert not list(tmp_path.glob("runs/*"))
    for words, wrong in (
        ([*files, "--only", "seed"], "selects stages of one recipe"),
        ([files[0], "--out", "x"], "give several recipes"),
        ([files[0], "--seeds", "0"], "give at least 1"),
    ):
        refused = small("submit", *words, "--dry-run")
        assert refused.code == 2
        assert wrong in refused.stderr
        assert wrong in small("cancel", *words).stderr
    assert "to select a stage: `--only seed`" in small("cancel", files[0], "seed").stderr
