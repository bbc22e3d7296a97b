"""The experts of an MoE layer without Transformer Engine: one grouped product a matrix.

All local experts' weights lie in one tensor a matrix, in Megatron's [out, in] orientation, and are
saved under the global names that its SequentialMLP and TEGroupedMLP use, so that checkpoints move
freely between the three.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_btx.engine.swiglu import swiglu

# Shapes: T tokens that reached this rank, E experts here, H hidden, F width of an expert here.


class GroupedExperts(MegatronModule):
    """SwiGLU experts, each FF(x) = W2 (silu(Wg x) * Wu x), applied to tokens sorted by expert.

    Args:
        num_local_experts: E.
        config: Megatron's; ``moe_ffn_hidden_size`` is the width of an expert.
        submodules: unused; part of Megatron's interface for experts.
        pg_collection: expert-parallel groups (``ep``, ``expt_tp``, ``expt_dp``).
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.gated_linear_unit
        assert not config.add_bias_linear
        self.num_local_experts = num_local_experts
        self.ep_group = pg_collection.ep
        self.tp_group = pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        self.fuse = config.gradient_accumulation_fusion
        hidden = config.hidden_size
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        self.linear_fc1 = _ExpertWeights((num_local_experts, 2 * width, hidden), 1, config)
        """[gate; up] of every expert: [E, 2F, H]."""
        self.linear_fc2 = _ExpertWeights((num_local_experts, hidden, width), 2, config)
        """[E, H, F]."""

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
    ) -> tuple[Tensor, None]:
        """Run every token through its expert and weigh it by its gate.

        Args:
            permuted_local_hidden_states: [T, H], sorted by expert.
            tokens_per_expert: [E], integers, summing to T.
            permuted_probs: [T], gates.

        Returns:
            [T, H] and no bias. The gate multiplies before the second matrix, which is the same by
            linearity and touches the narrower side, as in Megatron's own experts.
        """
        x_TH = permuted_local_hidden_states
        ends = tokens_per_expert.cumsum(0).to(device=x_TH.device, dtype=torch.int32)
        gate_up_TF = _GroupedLinear.apply(x_TH, self.linear_fc1.weight, ends, self.fuse)
        inner_TF = swiglu(gate_up_TF, permuted_probs)
        return _GroupedLinear.apply(inner_TF, self.linear_fc2.weight, ends, self.fuse), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global names and places of this rank's experts.

        ``{prefix}experts.linear_fc1.weight`` is [..., N, 2F, H] globally with [gate; up] along 2F
        whatever the tensor parallelism, ``linear_fc2`` is [..., N, H, F]; N counts all experts.
        """
        dims = len(sharded_offsets)
        ep = (dims, self.ep_group.rank(), self.ep_group.size())
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        replica_id = (0, 0, self.dp_group.rank())
        fc1_key = f"{prefix}experts.linear_fc1.weight"
        fc2_key = f"{prefix}experts.linear_fc2.weight"

        def halves(
            key: str, data: Tensor, replica: tuple, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            """Gate and up apart: each is contiguous in the global tensor, together they are not."""
            assert flattened_range is None, "ask for fully_reshardable optimizer checkpoints"
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    ep,
                    (dims + 1, which * tp_size + tp_rank, 2 * tp_size),
                    replica_id=replica,
                    prepend_axis_num=dims,
                )
                for which, half in enumerate(data.chunk(2, dim=1))
            ]

        def joined(parts: list[Tensor]) -> Tensor:
            with torch.no_grad():
                return torch.cat(parts, dim=-2)

        return {
            f"{prefix}linear_fc1.weight": ShardedTensorFactory(
                fc1_key, self.linear_fc1.weight, halves, joined, replica_id
            ),
            f"{prefix}linear_fc2.weight": ShardedTensor.from_rank_offsets(
                fc2_key,
                self.linear_fc2.weight,
                *sharded_offsets,
                ep,
                (dims + 2, tp_rank, tp_size),
                replica_id=replica_id,
                prepend_axis_num=dims,
            ),
        }

    def backward_dw(self) -> None:
        """Nothing is delayed: weight gradients are computed with the others."""


class _ExpertWeights(torch.nn.Module):
    """One weight tensor [E, ...] under the name ``weight``, marked as Megatron marks an expert's:
    its gradient is reduced over the expert-data-parallel group (``allreduce=False``).

    With one expert-parallel rank Megatron marks it for the ordinary data-parallel group. That is
    right only where expert and dense tensor parallelism agree; the recipe refuses the layout where
    they do not.
    """

    def __init__(
        self, shape: tuple[int, int, int], partition_dim: int, config: TransformerConfig
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.allreduce = config.expert_model_parallel_size == 1  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(self.weight, True, partition_dim, 1)
        config.init_method(self.weight)


class _GroupedLinear(torch.autograd.Function):
    """``x_e W_e^T`` for every expert's rows: ``x`` [T, K], ``weights`` [E, M, K], ``ends`` [E]
    (int32, where each expert's rows end). The gradients are grouped products too.

    Written out because the built-in backward refuses the strided gradients that autograd hands it,
    and because with ``fuse`` the weights' gradient goes straight into Megatron's buffer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor, fuse: bool) -> Tensor:
        ctx.save_for_backward(x, weights, ends)
        # The parameter itself: a saved one comes back as another object, without `main_grad`.
        ctx.parameter = weights if fuse and hasattr(weights, "main_grad") else None
        return grouped_mm(x, weights.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:  # type: ignore[override]
        x, weights, ends = ctx.saved_tensors
        # Without a single row grouped_mm rejects the strides.
        grad = grad.contiguous() if len(x) else grad.new_empty(grad.shape)
        grad_x = grouped_mm(grad, weights, offs=ends)
        if not ctx.needs_input_grad[1]:  # frozen
            return grad_x, None, None, None
        if ctx.parameter is None:
            return grad_x, grouped_mm(grad.t(), x, offs=ends), None, None
        return grad_x, _accumulate(ctx.parameter, grad, x, ends), None, None


def _accumulate(weights: Any, grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Add ``grad_e^T x_e`` to every expert's part of ``weights.main_grad``.

    Returns:
        Memory that nothing reads, where autograd expects a gradient: Megatron's hook drops it.
    """
    if grad.device.type == "cpu" and grad.dtype == weights.main_grad.dtype:
        first = 0
        for expert, last in enumerate(ends.tolist()):
            weights.main_grad[expert].addmm_(grad[first:last].t(), x[first:last])
            first = last
    else:
        weights.main_grad.add_(grouped_mm(grad.t(), x, offs=ends))
    weights.grad_added_to_main_grad = True
    return torch.empty_like(weights)
