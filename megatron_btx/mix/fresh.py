"""A model that starts from nothing, as a plan: every weight a named draw.

The numbers depend on the seed and the tensor's name alone, so a seed model begins with the same
bits under every layout.
"""

from __future__ import annotations

import math

import torch

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.names import canonical_tensors
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.random_fill import Draw, Fill

_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")


def fresh(architecture: Architecture, *, seed: int, dtype: torch.dtype) -> Plan:
    """The plan of a newly initialised dense model.

    Megatron's own rule: normal with ``init_method_std``; matrices that write into the residual
    stream divided by ``sqrt(2 L)`` (its ``scaled_init_method_normal``); norms one, biases zero.
    """
    model = architecture.model
    expected = canonical_tensors(architecture)
    targets: dict[str, Expression] = {}
    for name, shape in expected.items():
        std = model.init_method_std
        if name.endswith(_RESIDUAL):
            std /= math.sqrt(2 * model.num_layers)
        if "norm" in name:
            targets[name] = Fill(1.0, shape, dtype)
        elif name.endswith("bias"):
            targets[name] = Fill(0.0, shape, dtype)
        else:
            targets[name] = Draw("normal", std, seed, name, shape, dtype)
    return Plan(architecture=architecture, targets=targets, sources={}, expected=expected)
