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


def save_as(directory: Path, layout: Layout, form: dict[str, Any]) -> None:
    """A dense model, saved in one of Megatron's other forms."""
    import json

    from megatron.core import dist_checkpointing, parallel_state

    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from tests.engine.harness import DENSE, set_weights

    distributed.initialize(layout, 0)
    model = build_model(DENSE, layout, "fp32")
    set_weights(model)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = model.sharded_state_dict(metadata={**form, "dp_cp_group": group})
    directory.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(sharded, str(directory))
    manifest = checkpoint.manifest_of(DENSE, precision="fp32", layout={})
    (directory / "manifest.json").write_text(json.dumps(manifest))
