"""What the ranks of these tests do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_btx.recipe.schema import Layout
from tests.engine.harness import Pieces, pieces


def load_through_megatron(directory: Path, layout: Layout, precision: Any) -> Pieces:
    """Megatron's own ``dist_checkpointing.load`` of a directory; this rank's shards."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.weights.manifest import read_manifest

    distributed.initialize(layout, 0)
    architecture, _ = read_manifest(directory)
    model = build_model(architecture, layout, precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    checkpoint.load(directory, checkpoint.TrainingState(model=model))
    return pieces(model, lambda parameter: parameter)
