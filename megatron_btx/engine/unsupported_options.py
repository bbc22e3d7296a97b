"""What becomes of a recipe's ``megatron:`` block where Megatron or our own modules would not follow
it: an error, never silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_btx.errors import UserError, UserErrors

Supported = dict[str, tuple[Any, ...]]
"""Field of ``TransformerConfig`` -> the values of it that are followed."""

TORCH_LAYERS: Supported = {
    "attention_dropout": (0.0,),
    "apply_query_key_layer_scaling": (False,),
    "apply_rope_fusion": (False,),
    "cpu_offloading": (False,),
    "cross_entropy_fusion_impl": ("native",),
    "cuda_graph_impl": ("none",),
    "enable_cuda_graph": (False,),
    "external_cuda_graph": (False,),
    "fp4": (None,),
    "fp8": (None,),
    "fp32_residual_connection": (False,),
    "moe_permute_fusion": (False,),
    "test_mode": (False,),
    "tp_comm_overlap": (False,),
    "use_kitchen": (False,),
    "use_te_activation_func": (False,),
}
"""Of the layers on plain torch (engine/spec.py). Transformer Engine's do these."""


def refuse_unfollowed(options: Mapping[str, Any], supported: Supported, who: str) -> None:
    """That ``who`` follows these options of ``TransformerConfig``.

    Raises:
        UserErrors: all that it would not.
    """
    wrong = [
        UserError(
            f"megatron.transformer.{name}",
            f"{options[name]!r} is not supported by {who}",
            f"use {' or '.join(map(repr, values))}",
        )
        for name, values in supported.items()
        if name in options and options[name] not in values
    ]
    if wrong:
        raise UserErrors(wrong)


@contextmanager
def megatron_errors(block: str) -> Iterator[None]:
    """Turn what Megatron refuses of ``megatron.<block>`` into an error for the user.

    Raises:
        UserError: Megatron's own words.
    """
    try:
        yield
    except (AssertionError, ImportError, KeyError, TypeError, ValueError) as refusal:
        words = str(refusal) or "an assertion without a message"
        raise UserError(
            f"megatron.{block}", f"Megatron-Core refuses this combination: {words}"
        ) from refusal
