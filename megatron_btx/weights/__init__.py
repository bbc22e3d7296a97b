"""Checkpoints as named tensors, and everything done to them as a plan.

A source answers "give me this box of that tensor"; an expression says what a tensor is made of; a
plan gives every target its expression and accounts for every source tensor; a sink takes boxes.
"""

from megatron_btx.weights.expression import (
    Cast,
    Cat,
    Draw,
    Expression,
    Fill,
    Reshape,
    Slice,
    Take,
    WeightedSum,
)
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.names import canonical_tensors
from megatron_btx.weights.ops import item, mean, rows, scaled, stack
from megatron_btx.weights.plan import Checkpoint, Ignore, Plan
from megatron_btx.weights.safetensors import SafetensorsSource
from megatron_btx.weights.sharded import load_into_sharded
from megatron_btx.weights.source import MemorySource, Source, View
from megatron_btx.weights.torch_dist import TorchDistSource

__all__ = [
    "Cast",
    "Cat",
    "Checkpoint",
    "Draw",
    "Expression",
    "Fill",
    "Ignore",
    "MemorySource",
    "Plan",
    "Reshape",
    "SafetensorsSource",
    "Slice",
    "Source",
    "Take",
    "TorchDistSource",
    "View",
    "WeightedSum",
    "canonical_tensors",
    "item",
    "load_into_sharded",
    "mean",
    "open_megatron",
    "rows",
    "scaled",
    "stack",
]
