"""One rank of one stage, as ``btx run`` starts it, but in the pool."""

from __future__ import annotations

import os
from pathlib import Path


def run_stage(recipe_path: str, stage: str) -> int:
    """The worker's exit code."""
    from megatron_btx.pipeline import graph, worker
    from megatron_btx.recipe.load import load_recipe

    for name in ("BTX_ATTEMPT", "BTX_STAGE_KEY"):
        os.environ.pop(name, None)
    recipe = load_recipe(recipe_path)
    return worker.run_rank(recipe, graph.find(graph.build(recipe), stage), Path(recipe.run_dir))
