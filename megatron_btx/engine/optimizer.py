"""Megatron's optimizer and learning-rate schedule from a stage of the recipe."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_btx.engine.unsupported_options import megatron_errors
from megatron_btx.recipe.schema import Training


def optimizer_config(training: Training) -> OptimizerConfig:
    """Megatron's configuration of the stage's AdamW.

    Raises:
        UserError: Megatron refuses the combination.
    """
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": training.lr,
        "min_lr": min_lr(training),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_eps": training.adam_eps,
        "clip_grad": training.clip_grad,
        "bf16": training.precision == "bf16",
        "use_distributed_optimizer": training.use_distributed_optimizer,
    }
    with megatron_errors("optimizer"):
        return OptimizerConfig(**(fields | training.megatron.optimizer))


def build_optimizer(model: DistributedDataParallel, training: Training) -> MegatronOptimizer:
    """AdamW with the stage's settings. Its state is fresh; master weights start from the model's
    (rounded) weights, so set those first, or call ``reload_model_params`` after."""
    with megatron_errors("optimizer"):
        return get_megatron_optimizer(optimizer_config(training), [model])


def build_schedule(
    optimizer: MegatronOptimizer, training: Training, steps: int
) -> OptimizerParamScheduler:
    """Warm-up, then decay to ``min_lr`` (the paper: cosine, to a tenth), which a step after the
    last would use. It is stepped by one an optimizer step."""
    warmup = min(training.lr_warmup_iters, max(0, steps - 1))
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=min_lr(training),
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
    )


def min_lr(training: Training) -> float:
    """Where the schedule ends: a tenth of the peak unless the recipe says otherwise."""
    return training.lr / 10 if training.min_lr is None else training.min_lr
