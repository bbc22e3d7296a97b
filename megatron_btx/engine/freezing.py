"""Which parameters of a live model learn, by the canonical names of what they hold.

A frozen parameter has no gradient: Megatron's DistributedDataParallel gives it no place in its
buffers and its optimizers take none, so that neither weight decay nor clipping reaches it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_btx.engine.moe.experts import GroupedExperts
from megatron_btx.errors import UserError
from megatron_btx.recipe.names import DENSE_NORM, EMBEDDING, HEAD, QKV_NORM

_NORMS = {"input_layernorm.weight": QKV_NORM, "pre_mlp_layernorm.weight": DENSE_NORM}
"""Names of the local layer specification; an MoE layer's second norm has the canonical one."""


def canonical_names(model: GPTModel) -> dict[str, tuple[str, ...]]:
    """Canonical names of what each parameter here holds: one, or an expert's each.

    Args:
        model: this rank's part, without wrappers.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, _ in model.named_parameters():
        if not name.startswith("decoder.layers."):
            tied = name == HEAD and model.share_embeddings_and_output_weights
            found[name] = (EMBEDDING if tied else name,)
            continue
        _, _, number, rest = name.split(".", 3)
        layer: Any = model.decoder.layers[int(number)]
        prefix = f"decoder.layers.{layer.layer_number - 1}."
        if rest.startswith("mlp.experts."):
            found[name] = tuple(_experts(layer.mlp, prefix, rest))
        elif hasattr(layer.mlp, "experts") and rest.startswith("pre_mlp_layernorm"):
            found[name] = (prefix + rest,)
        else:
            found[name] = (prefix + _NORMS.get(rest, rest),)
    return found


def _experts(mlp: Any, prefix: str, rest: str) -> Iterator[str]:
    """Of one parameter of an MoE layer's experts: ours hold several, Transformer Engine's one."""
    linear, _, part = rest.removeprefix("mlp.experts.").partition(".")
    if isinstance(mlp.experts, GroupedExperts):
        parts = getattr(mlp.experts, linear).parts()
        local = next(experts for name, _, experts in parts if name == part)
    else:
        local = (int(part.removeprefix("weight")),)
    first = mlp.ep_group.rank() * mlp.num_local_experts
    for expert in local:
        yield f"{prefix}mlp.experts.{first + expert}.{linear}.weight"


def freeze(model: GPTModel, still: Collection[str]) -> None:
    """Let everything learn but ``still``. Before the model is wrapped.

    Args:
        model: this rank's part, without wrappers.
        still: canonical names.

    Raises:
        UserError: part of a rank's experts are frozen, and Transformer Engine computes them: its
            grouped product has gradients for all of them or none.
    """
    model.anything_frozen = bool(still)
    model.experts_apart = _some_experts(still, model.config.num_moe_experts or 0)
    for layer in model.decoder.layers:
        experts = getattr(layer.mlp, "experts", None)
        if isinstance(experts, GroupedExperts):
            experts.apart = model.experts_apart
            _divide(layer, experts, still)
        elif experts is not None:
            _refuse_part(layer, experts, still)
    names = canonical_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not all(held in still for held in names[name]))
    if still and model.pre_process and not hasattr(model, "_begins_with_gradient"):
        # Gradients go all the way down, whatever is frozen: a pipeline stage is asked for that of
        # its input's, and a layer that is recomputed has none if its input has none.
        model._begins_with_gradient = model.embedding.register_forward_hook(_with_gradient)


def _some_experts(still: Collection[str], number: int) -> bool:
    """Whether a matrix of some experts of a layer is frozen, and not that of all."""
    held: collections.Counter[tuple[str, str]] = collections.Counter()
    for name in still:
        layer, experts, rest = name.partition(".mlp.experts.")
        if experts:
            held[layer, rest.partition(".")[2]] += 1
    return any(count < number for count in held.values())


def numbered(model: GPTModel, sharded: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict in which every layer, and every expert where some are frozen,
    has a key of its own. Megatron gives an optimizer's tensors the keys of the model's, stacked
    over the layers: of what is frozen in one layer and not in another they would have holes.
    """
    if not getattr(model, "anything_frozen", False):
        return sharded
    apart = model.experts_apart

    def named(entry: Any) -> Any:
        if isinstance(entry, ShardedTensorFactory):
            return dataclasses.replace(entry, build_fn=lambda *own: _each(entry.build_fn(*own)))
        if not isinstance(entry, ShardedTensor) or not entry.prepend_axis_num:
            return entry
        taken = 2 if apart and ".mlp.experts.experts." in entry.key else 1
        before = entry.prepend_axis_num
        alone = (1,) if taken > before else ()  # an axis of one expert that the data have too
        return dataclasses.replace(
            entry,
            key=".".join([entry.key, *map(str, entry.global_offset[:taken])]),
            global_shape=(*alone, *entry.global_shape[taken:]),
            global_offset=(*(0 for _ in alone), *entry.global_offset[taken:]),
            axis_fragmentations=(*alone, *entry.axis_fragmentations[taken:]),
            prepend_axis_num=max(before - taken, 0),
        )

    def _each(built: Any) -> Any:
        if isinstance(built, dict):
            return {key: named(one) for key, one in built.items()}
        return [named(one) for one in built] if isinstance(built, list) else named(built)

    return {key: named(entry) for key, entry in sharded.items()}


def _divide(layer: Any, experts: GroupedExperts, still: Collection[str]) -> None:
    first = layer.mlp.ep_group.rank() * experts.num_local_experts
    stem = f"decoder.layers.{layer.layer_number - 1}.mlp.experts"
    for linear in ("linear_fc1", "linear_fc2"):
        local = range(experts.num_local_experts)
        held = [e for e in local if f"{stem}.{first + e}.{linear}.weight" in still]
        getattr(experts, linear).divide(held)


def _refuse_part(layer: Any, experts: torch.nn.Module, still: Collection[str]) -> None:
    stem = f"decoder.layers.{layer.layer_number - 1}."
    for linear in ("linear_fc1", "linear_fc2"):
        held = {
            expert in still
            for name, _ in experts.named_parameters()
            if name.startswith(linear)
            for expert in _experts(layer.mlp, stem, f"mlp.experts.{name}")
        }
        if len(held) > 1:
            raise UserError(
                "freeze",
                "names some of the experts of a rank: Transformer Engine's grouped product has "
                "gradients for all of them or for none",
                "give each rank experts that are alike (expert_model_parallel_size)",
            )


def _with_gradient(_module: torch.nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output
