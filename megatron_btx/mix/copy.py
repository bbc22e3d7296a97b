"""The simplest plan: a model as it is, under any layout and in any precision."""

from __future__ import annotations

import torch

from megatron_btx.weights.names import canonical_tensors
from megatron_btx.weights.plan import Checkpoint, Plan


def copy(model: Checkpoint, *, dtype: torch.dtype) -> Plan:
    """Every tensor of ``model``, rounded to ``dtype`` where it has another."""
    return Plan(
        architecture=model.architecture,
        targets={name: take.to(dtype) for name, take in model.tensors.items()},
        sources={model.label: model.source},
        expected=canonical_tensors(model.architecture),
    )
