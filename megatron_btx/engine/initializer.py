"""Weights of a live, sharded model from a plan: the BTX initializer.

The finetuning job starts from N dense checkpoints, each saved under whatever layout. Every rank
evaluates the plan for the shards it holds: it reads the FFN tensors of its own experts only, and of
everything else the slices that it averages, accumulated in fp64 and rounded once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from megatron_btx.engine.checkpoint import model_sharded_state_dict
from megatron_btx.engine.model import DTYPES
from megatron_btx.mix.plan_of_recipe import mix_plan
from megatron_btx.recipe.schema import Mix, Precision, Routing
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Plan
from megatron_btx.weights.sharded import load_into_sharded

logger = logging.getLogger(__name__)


def initialize(model: torch.nn.Module, plan: Plan) -> dict[str, int]:
    """Set the weights of this rank's part of a model. Before the optimizer is built: its master
    weights are copies of what the model then holds.

    Returns:
        Bytes that this rank read from each source.

    Raises:
        UserErrors: model and plan disagree; nothing has been written.
    """
    return load_into_sharded(plan, model_sharded_state_dict(model))


def btx_plan(
    checkpoints: Iterable[tuple[str, Path]],
    *,
    mix: Mix,
    routing: Routing,
    precision: Precision,
    random_seed: int,
) -> Plan:
    """The mix that a recipe asks for, of Megatron checkpoints on disk.

    Args:
        checkpoints: (name, directory) of every model, in the order of the experts.
        mix: by what method and with which options.
        routing: of the MoE.
        precision: of its weights.
        random_seed: the recipe's; seeds the routers.

    Raises:
        UserErrors: the checkpoints cannot be read or do not go together.
    """
    return mix_plan(
        [open_megatron(directory, name) for name, directory in checkpoints],
        mix=mix,
        routing=routing,
        dtype=DTYPES[precision],
        random_seed=random_seed,
    )
