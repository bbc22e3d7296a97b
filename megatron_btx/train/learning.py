"""What learns in each step of a stage: the model wrapped for it, its optimizer and its schedule."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_btx.engine import optimizer_state
from megatron_btx.engine.model import without_ddp, wrap_ddp
from megatron_btx.engine.optimizer import build_optimizer, build_schedule
from megatron_btx.recipe import freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Training
from megatron_btx.train.loop import Run


class Learning:
    """The phases of a stage (recipe/freezing.py).

    Args:
        architecture: what it trains.
        training: its settings.
        model: the recipe's.
    """

    def __init__(self, architecture: Architecture, training: Training, model: Model) -> None:
        self.architecture, self.training = architecture, training
        self.phases = freezing.phases(architecture, training, model)

    def at(self, step: int) -> freezing.Phase:
        """The phase of a step; behind the last one, the last."""
        return next((phase for phase in self.phases if step < phase.last), self.phases[-1])

    def flops_per_token(self, step: int) -> int:
        """Of training, in that step."""
        return freezing.flops_per_token(self.architecture, self.at(step).frozen)

    def begin(
        self, model: torch.nn.Module, step: int
    ) -> tuple[torch.nn.Module, MegatronOptimizer, OptimizerParamScheduler]:
        """Wrapper, optimizer and schedule for training from ``step`` on; a fresh optimizer."""
        training = self.training
        wrapped = wrap_ddp(
            model,
            use_distributed_optimizer=training.use_distributed_optimizer,
            frozen=self.at(step).frozen,
            options=training.megatron,
        )
        rates = freezing.rates(self.architecture, training.lr_groups)
        optimizer = build_optimizer(wrapped, training, rates)
        return wrapped, optimizer, build_schedule(optimizer, training, self.phases[-1].last)

    def thaw(self, run: Run) -> None:
        """Begin the next phase: everything that has learned keeps its optimizer's state to the bit,
        what begins to learn has none. Every rank calls it."""
        carried = optimizer_state.take(run.model, run.optimizer)
        schedule = run.schedule.state_dict()
        run.model, run.optimizer, run.schedule = self.begin(without_ddp(run.model), run.step)
        optimizer_state.give(run.model, run.optimizer, carried)
        run.schedule.load_state_dict(schedule)
        per_token = self.flops_per_token(run.step)
        run.device = dataclasses.replace(run.device, flops_per_token=per_token)
