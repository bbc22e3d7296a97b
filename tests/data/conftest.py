"""One small prepared run for all tests of this room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.data.prepare import prepare
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "recipe.yaml"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """The tiny recipe, and a run directory in which its prepare stage is done."""
    run_dir = tmp_path_factory.mktemp("prepared")
    recipe = replace(load_recipe(TINY), run_dir=str(run_dir))
    prepare(recipe, run_dir / "prepare")
    return recipe, run_dir
