"""AdamW for machines without fused optimizers: torch's kernel behind the fused ones' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


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
