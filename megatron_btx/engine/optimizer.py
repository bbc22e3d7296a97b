"""Megatron's optimizer and learning-rate schedule from a stage of the recipe; and the Adam that it
has where there is no fused one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from megatron_btx.engine.model import canonical_parameters, model_chunks
from megatron_btx.engine.unsupported_options import megatron_errors
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Training

NO_RATES: Mapping[str, float] = MappingProxyType({})


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


def build_optimizer(
    model: torch.nn.Module, training: Training, rates: Mapping[str, float] = NO_RATES
) -> MegatronOptimizer:
    """AdamW with the stage's settings. Its state is fresh; master weights start from the model's
    (rounded) weights, so set those first, or call ``reload_model_params`` after.

    Args:
        model: wrapped; what does not learn has no state.
        training: the stage's settings.
        rates: peak learning rates of their own by canonical name (recipe/freezing.py).

    Raises:
        UserError: Megatron refuses the combination, or one tensor here holds experts of different
            rates.
    """
    with megatron_errors("optimizer"):
        config = optimizer_config(training)
        overrides = get_standard_config_overrides(config)
        for rate, own in _by_rate(model, rates).items():
            lr = {"max_lr": rate, "min_lr": min_lr(training) * rate / training.lr}
            here = ParamWithNamePredicate(f"lr {rate}", lambda p, _, own=own: id(p) in own)
            overrides[ParamKey(with_name_predicate=here)] = ParamGroupOverride(**lr)
        built: Any = get_megatron_optimizer(
            config, model_chunks(model), overrides if rates else None
        )
    # Where nothing of a kind learns on any rank, Megatron leaves an empty shell that can neither be
    # saved nor loaded.
    whole = [one for one in built.chained_optimizers if not one.is_stub_optimizer]
    return built if len(whole) == len(built.chained_optimizers) else ChainedOptimizer(whole)


def _by_rate(model: torch.nn.Module, rates: Mapping[str, float]) -> dict[float, set[int]]:
    """Ids of the parameters that have a learning rate of their own, by that."""
    found: dict[float, set[int]] = {}
    for names, parameter in canonical_parameters(model) if rates else ():
        own = {rates.get(held) for held in names}
        if len(own) > 1:
            what = "gives experts on one rank different learning rates: one tensor holds "
            what += f"{names[0]} to {names[-1]}"
            fix = "use one rate, or one expert on each rank (expert_model_parallel_size)"
            raise UserError("lr_groups", what, fix)
        (rate,) = own
        if rate is not None and parameter.requires_grad:
            found.setdefault(rate, set()).add(id(parameter))
    return found


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of the parameters without one of their own (``lr_groups``); if there are none, of
    the first group."""
    groups = optimizer.param_groups
    plain = [group for group in groups if group.get("default_config", True)]
    return float((plain or groups)[0]["lr"])


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
        wsd_decay_steps=training.lr_wsd_decay_iters,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
    )


def min_lr(training: Training) -> float:
    """Where the schedule ends: a tenth of the peak unless the recipe says otherwise."""
    return training.lr / 10 if training.min_lr is None else training.min_lr


class Adam(torch.optim.Optimizer):
    """Adam or AdamW whose ``step`` lives in the parameter group, as in Apex's and Transformer
    Engine's ``FusedAdam``: a parameter's state is ``exp_avg`` and ``exp_avg_sq`` and nothing else,
    the form in which Megatron's distributed optimizer saves and reshards it.

    The update is torch's own (``torch.optim.adamw.adamw``), its fused kernel where there is one.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled (AdamW) when ``adam_w_mode``, else added to the gradient.
        adam_w_mode: as ``FusedAdam``'s argument.
        capturable: Megatron's (0.17) for steps inside CUDA graphs; only false is supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not capturable, "optimizer_cuda_graph needs a fused optimizer"
        self.update = adamw if adam_w_mode else adam
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("closures are not supported")
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._state_of(param) for param in params]
            # The functional form counts the step up itself, in a tensor a parameter.
            before = torch.tensor(float(group["step"] - 1), device=params[0].device)
            beta1, beta2 = group["betas"]
            self.update(
                params,
                [param.grad for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [before.clone() for _ in params],
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                fused=True,
            )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
