"""RMSNorm without Transformer Engine, also under sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` (arXiv 1910.07467, equation 4), statistics in fp32.

    Megatron's own ``WrappedTorchNorm`` refuses sequence parallelism, which its MoE layers require
    with tensor parallelism. Under it a rank's norm processes a slice of the sequence; marking the
    weight ``sequence_parallel`` makes ``finalize_model_grads`` sum the gradients of all slices.

    Args:
        config: ``sequence_parallel`` and ``params_dtype`` are read.
        hidden_size: width of the last dimension.
        eps: added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` [..., H]; shape and dtype are kept."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """The normalisation and its gradient with few passes over memory: on a CPU, autograd's chain of
    element-wise operations takes longer than the matrix products of a small model."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Saves ``x`` and one reciprocal root mean square per row."""
        x32 = x.float()
        norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        rrms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rrms)
        return (x32 * rrms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """With r the reciprocal root mean square: dx = r g w - x r^3 mean(g w x), dw = sum g x
        r."""
        x, weight, rrms = ctx.saved_tensors
        x32, grad32, weight32 = x.float(), grad_output.float(), weight.float()
        product = grad32 * x32
        grad_weight = rrms.flatten() @ product.flatten(0, -2)
        slope = (product @ weight32).unsqueeze(-1).mul_(rrms.pow(3)).div_(x.shape[-1])
        grad_x = (grad32 * weight32).mul_(rrms).addcmul_(x32, slope, value=-1)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
