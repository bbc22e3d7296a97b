"""Which tensors learn in each step of a stage: the model wrapped for it, with its optimizer and
learning-rate schedule, and how training goes on when frozen tensors begin to learn.

Gradient buffers and optimizer are then made anew. Every other parameter keeps its moments and its
fp32 master weight to the bit, by canonical name, however the two optimizers divide them over
data-parallel ranks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_btx.engine.model import (
    canonical_parameters,
    gather_parameters,
    model_chunks,
    without_ddp,
    wrap_ddp,
)
from megatron_btx.engine.optimizer import build_optimizer, build_schedule
from megatron_btx.recipe import freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Training
from megatron_btx.train.loop import Run


class FreezingSchedule:
    """A stage's phases, in each of which the same tensors are frozen (recipe/freezing.py).

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
        carried = _take(run.model, run.optimizer)
        schedule = run.schedule.state_dict()
        run.model, run.optimizer, run.schedule = self.begin(without_ddp(run.model), run.step)
        _give(run.model, run.optimizer, carried)
        run.schedule.load_state_dict(schedule)
        per_token = self.flops_per_token(run.step)
        run.device = dataclasses.replace(run.device, flops_per_token=per_token)


_STATES = ("param", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter: its master weight in fp32, and two moments."""


@dataclass
class _OptimizerState:
    """The optimizer's state of this rank's part of a model."""

    states: dict[str, Tensor] = field(default_factory=dict)
    """By canonical name, fp32 [3, ...]: ``_STATES`` of the tensor's part here, in host memory."""
    step: int = 0
    """Updates done, from which AdamW corrects the moments' bias."""


@torch.no_grad()
def _take(model: torch.nn.Module, optimizer: MegatronOptimizer) -> _OptimizerState:
    """The state of every parameter that learns, whole on each data-parallel rank; what the model
    was wrapped in is let go of. Every rank calls it."""
    gather_parameters(model)
    carried = _OptimizerState()
    owners = _owners(optimizer)
    for names, parameter in canonical_parameters(model):
        if not parameter.requires_grad:
            continue
        whole = _whole(owners[_is_expert(parameter)], parameter)
        parts = whole.unbind(1) if len(names) > 1 else (whole,)  # of several experts
        carried.states |= dict(zip(names, parts, strict=True))
    groups = [group for one in owners.values() for group in one.optimizer.param_groups]
    carried.step = max(int(group.get("step", 0)) for group in groups)
    for chunk in model_chunks(model):
        _let_go(chunk)
    return carried


@torch.no_grad()
def _give(model: torch.nn.Module, optimizer: MegatronOptimizer, carried: _OptimizerState) -> None:
    """Put back what :func:`_take` took; what has none begins without moments, from the model's
    weight. AdamW's count of updates is one for all, as Megatron's distributed optimizer has it."""
    owners = _owners(optimizer)
    for one in owners.values():
        one.init_state_fn(one.optimizer, one.config)
        for group in one.optimizer.param_groups:
            group["step"] = carried.step
    for names, parameter in canonical_parameters(model):
        known = [part for part in names if part in carried.states]
        if not parameter.requires_grad or not known:
            continue
        owner = owners[_is_expert(parameter)]
        whole = _whole(owner, parameter)
        for place, part in enumerate(names):
            if part in carried.states:
                target = whole[:, place] if len(names) > 1 else whole
                target.copy_(carried.states[part].reshape(target.shape))
        _set(owner, parameter, whole)


def _owners(optimizer: Any) -> dict[bool, Any]:
    """Megatron's optimizers by whether they are of expert-parallel parameters."""
    found = {}
    for one in optimizer.chained_optimizers:
        (is_expert,) = {group["is_expert_parallel"] for group in one.optimizer.param_groups}
        found[is_expert] = one
    return found


def _is_expert(parameter: torch.nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _whole(owner: Any, parameter: torch.nn.Parameter) -> Tensor:
    """``_STATES`` of a parameter [3, ...] in fp32, in host memory."""
    if isinstance(owner, DistributedOptimizer):
        return _gathered(owner, parameter)
    main = getattr(parameter, "main_param", parameter)
    state = owner.optimizer.state[main]
    return torch.stack([main.detach(), state["exp_avg"], state["exp_avg_sq"]]).float().cpu()


def _gathered(owner: DistributedOptimizer, parameter: torch.nn.Parameter) -> Tensor:
    """From the ranks that share it. Bits are added, not numbers: zeros of either sign stay."""
    device = torch.cuda.current_device()
    bits = torch.zeros(len(_STATES), parameter.numel(), dtype=torch.int32, device=device)
    if parameter in owner.model_param_gbuf_map:
        place = owner._get_model_param_range_map(parameter)["param"]
        tensors = owner._get_main_param_and_optimizer_states(parameter)
        for row, name in zip(bits, _STATES, strict=True):
            row[place.start : place.end] = tensors[name].detach().float().view(torch.int32)
    dist.all_reduce(bits, group=owner.data_parallel_group)
    return bits.view(torch.float32).reshape(len(_STATES), *parameter.shape).cpu()


def _set(owner: Any, parameter: torch.nn.Parameter, whole: Tensor) -> None:
    if isinstance(owner, DistributedOptimizer):
        if parameter in owner.model_param_gbuf_map:
            place = owner._get_model_param_range_map(parameter)["param"]
            rows = whole.flatten(1)[:, place.start : place.end]
            tensors = {name: row for name, row in zip(_STATES, rows, strict=True)}
            owner._set_main_param_and_optimizer_states(parameter, tensors)
        return
    main = getattr(parameter, "main_param", parameter)
    state = owner.optimizer.state[main]
    for target, row in zip((main, state["exp_avg"], state["exp_avg_sq"]), whole, strict=True):
        target.copy_(row)


def _let_go(model: Any) -> None:
    """Remove a wrapper's hooks from its parameters: a graph that is still in memory keeps them
    alive."""
    if model.use_forward_hook:
        model.disable_forward_pre_hook(param_sync=False)
    model.param_to_bucket_group.clear()
    model.grad_accs.clear()
    for parameter in model.parameters():
        for name in ("main_grad", "main_param"):
            vars(parameter).pop(name, None)
