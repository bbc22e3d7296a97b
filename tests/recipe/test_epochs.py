"""Tokens and epochs of every domain in every stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.cli.main import main
from megatron_btx.recipe import epochs, run_plan
from megatron_btx.recipe.load import dump, load_recipe
from megatron_btx.recipe.schema import Recipe

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "recipe.yaml"


def domains_of(recipe: Recipe, tokens: int) -> dict[str, dict[str, dict[str, int | None]]]:
    size: dict[str, int | None] = {"documents": 7, "tokens": tokens, "bytes": None}
    return {name: {"train": size, "valid": {**size, "bytes": 3}} for name in recipe.domains}


def trained(recipe: Recipe) -> list[str]:
    return [stage.name for stage in run_plan.plan(recipe).stages if stage.steps]


def test_every_token_is_of_a_domain() -> None:
    recipe = load_recipe(TINY)
    made = run_plan.plan(recipe)
    read = epochs.reading(recipe, trained(recipe), domains_of(recipe, 1000))
    for stage in made.stages:
        mine = [one for one in read if one.stage == stage.name]
        assert abs(sum(one.tokens for one in mine) - stage.tokens) <= len(mine)
        for one in mine:
            assert one.epochs == pytest.approx(one.tokens / 1000, abs=1e-3)
    assert "dense" in {one.stage for one in read}
    (code,) = [one for one in read if (one.stage, one.domain) == ("expert:code", "code")]
    weights = recipe.experts["code"].data
    (whole,) = [stage.tokens for stage in made.stages if stage.name == "expert:code"]
    assert code.tokens == round(whole * weights["code"] / sum(weights.values()))


def test_part_that_is_read_most_counts() -> None:
    recipe = load_recipe(TINY)
    domains = domains_of(recipe, 1000)
    blend = {"blend": [[900, 0.5], [100, 0.5]]}
    both = {name: {"train": {**d["train"], **blend}} for name, d in domains.items()}
    plain = epochs.reading(recipe, ["seed"], domains)
    for one, other in zip(plain, epochs.reading(recipe, ["seed"], both), strict=True):
        assert other.epochs == pytest.approx(5 * (one.epochs or 0))


def test_warnings_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replace(load_recipe(TINY), run_dir=str(tmp_path / "run"))
    (tmp_path / "r.yaml").write_text(dump(recipe))
    assert main(["plan", str(tmp_path / "r.yaml")]) == 0
    assert "Epochs are known when stage prepare is done." in capsys.readouterr().out
    most = max(one.tokens for one in epochs.reading(recipe, trained(recipe), None))
    (tmp_path / "run" / "prepare").mkdir(parents=True)

    def said(tokens: int) -> str:
        content = {"domains": domains_of(recipe, tokens)}
        (tmp_path / "run" / "prepare" / "data.json").write_text(json.dumps(content))
        assert main(["plan", str(tmp_path / "r.yaml")]) == 0
        return capsys.readouterr().out

    assert "warning" not in said(most // 4 + 1)
    text = said(most // 4 - 1000)
    assert "goes through domain" in text
    assert "held-out documents" in text
    assert main(["plan", str(tmp_path / "r.yaml"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["reading"][0]["stage"] == "seed"
    assert set(content["domains"]) == set(recipe.domains)
