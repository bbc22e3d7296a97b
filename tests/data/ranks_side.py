"""What the ranks of these tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_btx.recipe.schema import Recipe


def read_steps(recipe: Recipe, name: str, run_dir: Path, steps: int) -> dict[str, Any]:
    """This rank's batches of the first steps, as lists."""
    from megatron_btx.data.mixture import stage_data
    from megatron_btx.engine import distributed
    from megatron_btx.recipe.stages import training

    distributed.initialize(training(recipe, name).layout, recipe.random_seed)
    stream = stage_data(recipe, name, run_dir)
    batches = [batch for step in range(steps) for batch in stream.batches(step)]
    return {key: [batch[key].tolist() for batch in batches] for key in batches[0]}
