"""What the ranks of these tests do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.recipe.schema import Layout, Routing
from tests.engine.harness import MOE, set_weights


def logits(directory: Path, layout: Layout, tokens: Tensor) -> tuple[Tensor | None, int]:
    """Megatron's logits of a ``torch_dist`` directory, which Megatron itself loads (``None`` where
    not the last stage of the pipeline is), and the number of parameters on this rank."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.weights.manifest import read_manifest

    distributed.initialize(layout, 0)
    architecture, _ = read_manifest(directory)
    model = build_model(architecture, layout, "fp32")
    checkpoint.load(directory, checkpoint.TrainingState(model=model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return _forward(model, tokens, architecture.vocab_size), parameters


def losses(directory: Path, layout: Layout, tokens: Tensor, labels: Tensor) -> Tensor:
    """Megatron's loss of every token [B, S], as in training."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.weights.manifest import read_manifest

    distributed.initialize(layout, 0)
    architecture, _ = read_manifest(directory)
    assert architecture.padded_vocab_size > architecture.vocab_size
    model = build_model(architecture, layout, "fp32")
    checkpoint.load(directory, checkpoint.TrainingState(model=model))
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    return model(tokens, positions, None, labels=labels).detach()


def changed_logits(
    directory: Path, tokens: Tensor, changes: list[dict[str, Any]]
) -> list[Tensor | None]:
    """On one rank, the logits of the same weights in models that differ in a field."""
    from megatron_btx.engine import distributed
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model
    from megatron_btx.mix.one_model import copy
    from megatron_btx.weights.megatron import open_megatron

    distributed.initialize(Layout(), 0)
    plan = copy(open_megatron(directory, "model"), dtype=torch.float32)
    found = []
    for change in changes:
        architecture = replace(plan.architecture, model=replace(plan.architecture.model, **change))
        model = build_model(architecture, Layout(), "fp32")
        initialize(model, plan)
        found.append(_forward(model, tokens, architecture.vocab_size))
    return found


def save_moe(
    directory: Path, layout: Layout, routing: Routing, tokens: Tensor, model_fields: dict[str, Any]
) -> Tensor | None:
    """Save an MoE of random weights; its logits."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model

    distributed.initialize(layout, 0)
    shape = replace(MOE.model, num_layers=2, **model_fields)
    architecture = replace(MOE, routing=routing, model=shape)
    model = build_model(architecture, layout, "fp32")
    set_weights(model)
    manifest = checkpoint.manifest_of(architecture, precision="fp32", layout={})
    checkpoint.save(directory, checkpoint.TrainingState(model=model), manifest)
    return _forward(model, tokens, architecture.vocab_size)


@torch.no_grad()
def _forward(model: torch.nn.Module, tokens: Tensor, vocabulary: int) -> Tensor | None:
    """Through Megatron's own schedule: the stages of a pipeline hand on what they computed."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()

    def step(_data: Any, part: torch.nn.Module) -> tuple[Tensor, Any]:
        return part(tokens, positions, None), lambda output, non_loss_data=True: output

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=len(tokens),
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not found:
        return None
    whole = gather_from_tensor_model_parallel_region(found[0])
    return whole[..., :vocabulary].float().contiguous()
