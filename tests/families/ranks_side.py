"""What the ranks of these tests do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_btx.recipe.schema import Layout, Routing
from tests.engine.harness import MOE, set_weights


def logits(directory: Path, layout: Layout, tokens: Tensor) -> Tensor:
    """Megatron's logits of a Hugging Face directory."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model
    from megatron_btx.families import open_hf
    from megatron_btx.mix.copy import copy

    distributed.initialize(layout, 0)
    plan = copy(open_hf(directory, "model"), dtype=torch.float32)
    architecture = plan.architecture
    model = build_model(architecture, layout, "fp32")
    initialize(model, plan)
    return _forward(model, tokens)[..., : architecture.vocab_size]


def save_moe(directory: Path, layout: Layout, routing: Routing, tokens: Tensor) -> Tensor:
    """Save an MoE of random weights; its logits."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model

    distributed.initialize(layout, 0)
    architecture = replace(MOE, routing=routing, model=replace(MOE.model, num_layers=2))
    model = build_model(architecture, layout, "fp32")
    set_weights(model)
    manifest = checkpoint.manifest_of(architecture, precision="fp32", layout={})
    checkpoint.save(directory, checkpoint.TrainingState(model=model), manifest)
    return _forward(model, tokens)[..., : architecture.vocab_size]


def _forward(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    with torch.no_grad():
        found = model(tokens, positions, None)
        return gather_from_tensor_model_parallel_region(found).float().contiguous()
