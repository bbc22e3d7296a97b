"""The experts of an MoE layer without Transformer Engine: grouped matrix products.

The weights of all local experts are one tensor per matrix, in Megatron's [out, in] orientation.
They are saved under the global names of Megatron's SequentialMLP and TEGroupedMLP, so that
checkpoints can be exchanged among the three."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_btx.engine.moe.expert_products import Held, arranged, feed_forward

# Shapes: T tokens that reached this rank, E experts here, H hidden, F width of an expert here.


class GroupedExperts(MegatronModule):
    """SwiGLU experts, each FF(x) = W2 (silu(Wg x) * Wu x), applied to tokens sorted by expert.

    Args:
        num_local_experts: E.
        config: Megatron's; ``moe_ffn_hidden_size`` is the width of an expert.
        submodules: unused; part of Megatron's interface for experts.
        pg_collection: expert-parallel groups (``ep``, ``expt_tp``, ``expt_dp``).
        name: unused; part of Megatron's interface since 0.18.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
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
        self.apart = False
        """Whether some experts are frozen, on this rank or another. Each expert is then saved as a
        tensor of its own, so that the optimizer's tensors of the trainable ones have no gaps."""
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
        """Apply to every token its expert, times its gate.

        Args:
            permuted_local_hidden_states: [T, H], sorted by expert.
            tokens_per_expert: [E], integers, summing to T.
            permuted_probs: [T], the gates.

        Returns:
            [T, H], and ``None`` for the bias.
        """
        x, counts = permuted_local_hidden_states, tokens_per_expert
        fc1, fc2 = self.linear_fc1, self.linear_fc2
        held = (fc1.held, fc2.held)
        out_TH = feed_forward(x, counts, fc1.weight, fc2.weight, self.fuse, held)
        return out_TH * permuted_probs.unsqueeze(-1).to(out_TH.dtype), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Global names and offsets of this rank's experts.

        ``{prefix}experts.linear_fc1.weight`` is [..., N, 2F, H] globally with [gate; up] along 2F
        whatever the tensor parallelism, ``linear_fc2`` is [..., N, H, F]; N counts all experts.
        """
        return {
            f"{prefix}{linear}.{part}": self._sharded(
                f"{prefix}experts.{linear}.weight", weight, experts, halves, sharded_offsets
            )
            for linear, halves in (("linear_fc1", 2), ("linear_fc2", 1))
            for part, weight, experts in getattr(self, linear).parts()
        }

    def _sharded(
        self, key: str, weight: Tensor, experts: Sequence[int], halves: int, offsets: tuple
    ) -> ShardedTensor | ShardedTensorFactory:
        """The shards of ``weight`` [len(experts), ...]: one of all experts, or one of each where
        ``apart``. Gate and up (``halves`` = 2) are separate shards: each is contiguous in the
        global tensor, together they are not."""
        dims = len(offsets)
        size = 1 if self.apart else self.num_local_experts
        first = self.ep_group.rank() * self.num_local_experts
        shards = self.ep_group.size() * self.num_local_experts // size
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()

        def split(
            key: str, data: Tensor, replica: tuple, flattened_range: slice | None
        ) -> list[ShardedTensor]:
            assert flattened_range is None, "ask for fully_reshardable optimizer checkpoints"
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *offsets,
                    (dims, (first + expert) // size, shards),
                    (dims + 3 - halves, which * tp_size + tp_rank, halves * tp_size),
                    replica_id=replica,
                    prepend_axis_num=dims,
                )
                for expert, shard in zip(experts[::size], data.split(size), strict=True)
                for which, half in enumerate(shard.chunk(halves, dim=1))
            ]

        def join(parts: list[Tensor]) -> Tensor:
            with torch.no_grad():
                each = [torch.cat(parts[i : i + halves], -2) for i in range(0, len(parts), halves)]
                return each[0] if len(each) == 1 else torch.cat(each, -3)

        replica_id = (0, 0, self.dp_group.rank())
        whole = split(key, weight, replica_id, None)
        if len(whole) == 1:
            whole[0].data = weight  # not a view of it: optimizers look parameters up by identity
            return whole[0]
        return ShardedTensorFactory(key, weight, split, join, replica_id)

    def backward_dw(self) -> None:
        """Part of Megatron's interface; weight gradients are not delayed here."""


class _ExpertWeights(torch.nn.Module):
    """One weight tensor [E, ...] under the name ``weight``, marked as Megatron marks an expert's:
    its gradient is reduced over the expert-data-parallel group (``allreduce=False``).

    With one expert-parallel rank Megatron marks it for the ordinary data-parallel group. This is
    correct only if expert and dense tensor parallelism are equal; the recipe refuses other layouts.
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
        self.register_parameter("frozen", None)
        self.frozen: torch.nn.Parameter | None
        """Weights of the frozen experts [E - len(learn), ...]; ``None`` if none or all are
        frozen."""
        self.learn: tuple[int, ...] = tuple(range(shape[0]))
        """The experts in ``weight``, in order."""

    @property
    def held(self) -> Held | None:
        """The frozen experts, as ``feed_forward`` takes them."""
        return None if self.frozen is None else (self.frozen, self.learn)

    def parts(self) -> list[tuple[str, Tensor, tuple[int, ...]]]:
        """Name and value of the parameters, and the experts in each."""
        if self.frozen is None:
            return [("weight", self.weight, self.learn)]
        number = len(self.weight) + len(self.frozen)
        still = tuple(expert for expert in range(number) if expert not in self.learn)
        return [("weight", self.weight, self.learn), ("frozen", self.frozen, still)]

    @torch.no_grad()
    def divide(self, still: Collection[int]) -> None:
        """Move the experts ``still`` to ``frozen``, so that they are in no gradient buffer and no
        optimizer. If none or all experts are frozen, all are in ``weight``."""
        whole = arranged(self.weight, self.held)
        every = range(len(whole))
        rest = [expert for expert in every if expert in still]
        rest = rest if len(rest) < len(whole) else []
        learn = tuple(expert for expert in every if expert not in rest)
        if learn == self.learn:
            return
        attributes = {k: v for k, v in vars(self.weight).items() if k in _ATTRIBUTES}
        self.weight = torch.nn.Parameter(whole[list(learn)].clone())
        self.frozen = torch.nn.Parameter(whole[rest].clone()) if rest else None
        for parameter in self.parameters():
            vars(parameter).update(attributes)
        self.learn = learn


_ATTRIBUTES = ("allreduce", "tensor_model_parallel", "partition_dim", "partition_stride")
"""Attributes by which Megatron marks a weight."""
