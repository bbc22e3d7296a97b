"""The lowest and highest value of every number of a recipe."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.messages import show
from megatron_btx.recipe.schema import (
    Domain,
    Evaluate,
    Layout,
    Mix,
    Model,
    Recipe,
    Routing,
    Tokenizer,
    Training,
)

_SIZES: dict[type, tuple[str, ...]] = {
    Model: (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "seq_length",
        "max_position_embeddings",
        "make_vocab_size_divisible_by",
    ),
    Tokenizer: ("vocab_size", "train_bytes"),
    Domain: ("builtin_bytes",),
    Layout: (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "data_parallel_size",
        "expert_model_parallel_size",
        "expert_tensor_parallel_size",
        "num_threads",
    ),
    Training: (
        "global_batch_size",
        "micro_batch_size",
        "save_interval",
        "keep_checkpoints",
        "eval_tokens",
    ),
    Routing: ("moe_router_topk",),
    Mix: ("copies", "num_chunks"),
    Evaluate: ("tokens", "micro_batch_size"),
    Recipe: ("max_parallel_jobs",),
}
"""Counts that are at least 1."""

_MOST = {
    "num_layers": 10_000,
    "hidden_size": 10**6,
    "ffn_hidden_size": 10**7,
    "num_attention_heads": 10**5,
    "num_query_groups": 10**5,
    "kv_channels": 10**5,
    "seq_length": 10**9,
    "max_position_embeddings": 10**9,
    "make_vocab_size_divisible_by": 10**6,
    "vocab_size": 10**8,
    **dict.fromkeys(_SIZES[Layout], 10**6),
    "global_batch_size": 10**9,
    "micro_batch_size": 10**6,
    "copies": 1000,
    "num_chunks": 1000,
}
"""Highest value of a field by its name, far above all that exists: what is beyond is a slip of the
hand, and a plan of it would not end."""

_UTMOST = 10**18
"""That of any other number."""

_INF = float("inf")
_RANGES: dict[type, dict[str, tuple[float, float]]] = {
    Model: {
        "rotary_base": (1, _INF),
        "layernorm_epsilon": (1e-12, 0.01),
        "rope_scaling_factor": (1, _INF),
        "seq_len_interpolation_factor": (1, _INF),
        "init_method_std": (0, 10),
    },
    Training: {
        "tokens": (0, _INF),
        "lr": (1e-12, 10),
        "min_lr": (0, 10),
        "lr_warmup_iters": (0, _INF),
        "weight_decay": (0, 100),
        "adam_beta1": (0, 0.999999),
        "adam_beta2": (0, 0.9999999),
        "adam_eps": (1e-20, 1),
        "clip_grad": (0, _INF),
        "eval_interval": (0, _INF),
        "check_replicas_interval": (0, _INF),
    },
    Routing: {
        "balance_loss_coeff": (0, 1000),
        "moe_expert_capacity_factor": (0.01, _INF),
        "temperature_min": (1e-6, _INF),
        "temperature_rate": (0, _INF),
        "moe_aux_loss_coeff": (0, 1000),
        "moe_z_loss_coeff": (0, 1000),
    },
    Mix: {
        "dare": (0, 0.999),
        "noise": (0, 100),
        "drop_ratio": (0, 1),
        "router_init_std": (0, 100),
    },
    Recipe: {"random_seed": (0, 2**31 - 1)},
}
"""Lowest and highest value; ``None`` is always allowed."""


def sizes(recipe: Recipe) -> Iterator[Problem]:
    """Numbers with which nothing else can be computed: none of a size, or beyond all sense."""
    for cls, name, key, item in _numbers(recipe):
        most = _MOST.get(name, _UTMOST)
        if name in _SIZES.get(cls, ()) and item < 1:
            yield Problem(key, f"is {show(item)}, out of range", "give at least 1")
        elif item > most:
            yield Problem(key, f"is {show(item)}, out of range", f"give at most {most:.10g}")


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Numbers outside what they mean."""
    for cls, name, key, item in _numbers(recipe):
        low, high = _RANGES.get(cls, {}).get(name, (-_INF, _INF))
        if not low <= item <= high:
            wanted = f"at least {low:g}" if high == _INF else f"{low:g} to {high:.10g}"
            yield Problem(key, f"is {show(item)}, out of range", f"give {wanted}")


def _numbers(value: Any, key: str = "") -> Iterator[tuple[type, str, str, float]]:
    """Every number in a block and in those under it: class and name of its field, dotted key, and
    the number."""
    for field in fields(value):
        item = getattr(value, field.name)
        dotted = f"{key}.{field.name.rstrip('_')}".lstrip(".")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            yield type(value), field.name, dotted, item
        entries = {dotted: item}
        if isinstance(item, dict):
            entries = {f"{dotted}.{name}": entry for name, entry in item.items()}
        for name, entry in entries.items():
            if is_dataclass(entry):
                yield from _numbers(entry, name)
