"""Weights of a live, sharded model from a plan: the BTX initializer.

The finetuning job starts from N dense checkpoints, each saved under whatever layout. Every rank
evaluates the plan for the shards it holds: it reads the FFN tensors of its own experts only, and of
everything else the slices that it averages, accumulated in fp64 and rounded once.
"""

from __future__ import annotations

import torch

from megatron_btx.engine.checkpoint import model_sharded_state_dict
from megatron_btx.engine.checkpoint_hashes import check_hashes
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.sharded import load_into_sharded


def initialize(model: torch.nn.Module, plan: Plan) -> dict[str, int]:
    """Set the weights of this rank's part of a model. Before the optimizer is built: its master
    weights are copies of what the model then holds.

    Returns:
        Bytes that this rank read from each source.

    Raises:
        UserErrors: model and plan disagree, and nothing has been written. Or files of a source
            were changed while they were read, or since they were written.
    """
    read = load_into_sharded(plan, model_sharded_state_dict(model))
    for directory, names in plan.files().items():
        check_hashes(directory, names)
    return read
