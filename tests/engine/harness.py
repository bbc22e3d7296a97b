"""The layout harness: train one model from the same weights on the same samples under a layout,
and bring back every parameter, gradient and replica under its global name.

Weights come from an independent generator keyed by the global name, so nothing of ours decides
what "the same model" means.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout, MegatronOptions, Model, Routing, Training

if TYPE_CHECKING:
    from megatron_btx.train.step import StepResult

DENSE = Architecture(
    model=Model(
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=16,
        make_vocab_size_divisible_by=64,
    ),
    vocab_size=120,  # padded to 128: the padding's rows take part in every comparison
)
MOE = replace(
    DENSE, experts=("a", "b", "c", "d"), routing=Routing(type="topk", balance_loss_coeff=0.02)
)

Pieces = list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]]
"""(global name, global shape, offset, values) of a rank's shards."""


@dataclass(frozen=True)
class Case:
    """One training run: 5 optimizer steps, of 4 micro-batches on one rank and of 1 under DP4."""

    architecture: Architecture = DENSE
    layout: Layout = Layout()
    precision: str = "fp32"
    use_distributed_optimizer: bool = False
    megatron: MegatronOptions = field(default_factory=MegatronOptions)
    steps: int = 5
    global_batch_size: int = 8
    micro_batch_size: int = 2
    random_seed: int = 7
    eos_id: int | None = None
    """Ends documents that are kept apart: attention is reset, and what follows is not predicted."""


@dataclass
class Trained:
    """What a rank saw."""

    losses: list[float]
    grad_norms: list[float]
    first_gradients: Pieces
    weights: Pieces


class Session:
    """A rank of a case, ready to train; the ranks' environment is set.

    Args:
        case: what is trained.
        weights: that the model has the weights of :func:`set_weights`.
    """

    def __init__(self, case: Case, *, weights: bool = True) -> None:
        from megatron_btx.engine import distributed
        from megatron_btx.engine.checkpoint import TrainingState
        from megatron_btx.engine.model import build_model, wrap_ddp
        from megatron_btx.engine.optimizer import build_optimizer, build_schedule

        distributed.initialize(case.layout, case.random_seed)
        training = Training(
            lr=1e-3,
            lr_warmup_iters=2,
            precision=case.precision,  # type: ignore[arg-type]
            use_distributed_optimizer=case.use_distributed_optimizer,
            layout=case.layout,
            megatron=case.megatron,
        )
        model = build_model(
            case.architecture,
            case.layout,
            training.precision,
            random_seed=case.random_seed,
            options=case.megatron,
        )
        if weights:
            set_weights(model)
        self.case = case
        self.ddp = wrap_ddp(
            model, use_distributed_optimizer=case.use_distributed_optimizer, options=case.megatron
        )
        optimizer = build_optimizer(self.ddp, training)
        schedule = build_schedule(optimizer, training, case.steps)
        self.state = TrainingState(model=self.ddp, optimizer=optimizer, schedule=schedule)

    def step(self, number: int) -> StepResult:
        """Train one step on its own samples."""
        from megatron_btx.train.step import train_step

        micro = list(microbatches(self.case, number))
        assert self.state.optimizer is not None
        assert self.state.schedule is not None
        return train_step(
            self.ddp,
            self.state.optimizer,
            self.state.schedule,
            iter(micro),
            step=number,
            num_microbatches=len(micro),
            micro_batch_size=self.case.micro_batch_size,
            seq_length=self.case.architecture.model.seq_length,
            masked=self.case.eos_id is not None,
        )

    def weights(self) -> Pieces:
        """The rank's, as they are now."""
        return pieces(self.ddp, lambda param: param)

    def manifest(self, step: int) -> dict[str, Any]:
        """Of a checkpoint of it."""
        from megatron_btx.engine.checkpoint import manifest_of

        return manifest_of(
            self.case.architecture,
            precision=self.case.precision,
            step=step,
            layout={"world_size": self.case.layout.world_size},
        )


def train(case: Case) -> Trained:
    """Run on every rank of a case."""
    session = Session(case)
    first = gradients(session.ddp, list(microbatches(case, 0)), case)
    steps = [session.step(number) for number in range(case.steps)]
    losses, norms = [one.loss for one in steps], [one.grad_norm for one in steps]
    return Trained(losses, norms, first, session.weights())


def gradients(ddp: Any, micro: list[Any], case: Case) -> Pieces:
    """The reduced gradient of the first step, parameter by parameter, without an update."""
    import functools

    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_btx.engine.model import for_chunks, model_chunks
    from megatron_btx.train.step import forward_step, token_weight

    for chunk in model_chunks(ddp):
        chunk.zero_grad_buffer()
    weight = None if case.eos_id is None else token_weight([one["loss_mask"] for one in micro])
    get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, step=0, weight=weight),
        data_iterator=for_chunks(ddp, iter(micro)),
        model=model_chunks(ddp),
        num_microbatches=len(micro),
        seq_length=case.architecture.model.seq_length,
        micro_batch_size=case.micro_batch_size,
        forward_only=False,
    )
    if case.use_distributed_optimizer:
        gather_gradients(ddp)
    return pieces(ddp, lambda p: p.main_grad)


def gather_gradients(ddp: Any) -> None:
    """Make every rank's gradient whole where reducing has left each a shard of it."""
    from megatron_btx.engine.model import model_chunks

    for chunk in model_chunks(ddp):
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            peers = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = bucket.grad_data.chunk(peers.size())
                mine = shards[peers.rank()].clone()
                torch.distributed.all_gather(list(shards), mine, group=peers)


def microbatches(case: Case, step: int) -> Iterator[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches of a step, cut from one global batch."""
    from megatron.core import parallel_state

    from megatron_btx.data.boundaries import Boundaries

    model = case.architecture.model
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (case.global_batch_size, model.seq_length + 1)
    uniform = torch.rand(shape, generator=generator)
    tokens = (uniform**4 * case.architecture.vocab_size).long()  # skewed: there is much to learn
    dp, mbs = parallel_state.get_data_parallel_world_size(), case.micro_batch_size
    for first in range(parallel_state.get_data_parallel_rank() * mbs, len(tokens), dp * mbs):
        rows = tokens[first : first + mbs]
        batch = {
            "tokens": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "loss_mask": torch.ones(mbs, model.seq_length),
            "position_ids": torch.arange(model.seq_length).expand(mbs, -1).contiguous(),
            "samples": torch.arange(first, first + mbs) + step * case.global_batch_size,
        }
        if case.eos_id is not None:
            both = {"reset_attention_mask": True, "eod_mask_loss": True}
            batch = Boundaries(eos_id=case.eos_id, **both).marked(batch)
        yield batch


def named_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The global tensor of a name: norms near one, everything else small and random."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return 1 + 0.1 * values if "norm" in name else values * (0.5 if "router" in name else 0.1)


def set_weights(model: torch.nn.Module) -> None:
    """Give every local shard its slice of the global tensor of its name."""
    with torch.no_grad():
        for name, shape, offset, local in shards(model, lambda param: param):
            whole = named_tensor(name, shape)
            cut = tuple(
                slice(o, o + n) for o, n in zip(offset, local_shape(local, shape), strict=True)
            )
            local.copy_(whole[cut].reshape(local.shape))


def local_shape(local: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shard's shape with the axes that stacking put in front."""
    return (1,) * (len(shape) - local.dim()) + tuple(local.shape)


def shards(model: torch.nn.Module, value: Any) -> Iterator[tuple[str, tuple, tuple, torch.Tensor]]:
    """(name, global shape, offset, local view of ``value(param)``) of every parameter here."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    from megatron_btx.engine.checkpoint import model_sharded_state_dict

    parameters = {id(p): p for p in model.parameters()}
    for entry in model_sharded_state_dict(model).values():
        if isinstance(entry, ShardedTensor):
            entry.data = value(parameters[id(entry.data)])
            found = [entry]
        elif isinstance(entry, ShardedTensorFactory):
            found = entry.build_fn(
                entry.key, value(parameters[id(entry.data)]), entry.replica_id, None
            )
        else:
            continue
        for shard in found:
            yield shard.key, tuple(shard.global_shape), tuple(shard.global_offset), shard.data


def pieces(model: torch.nn.Module, value: Any) -> Pieces:
    """``shards`` as plain arrays that can leave the process."""
    return [
        (
            name,
            shape,
            offset,
            local.detach().float().numpy().reshape(local_shape(local, shape)).copy(),
        )
        for name, shape, offset, local in shards(model, value)
    ]


def assemble(ranks: list[Pieces]) -> dict[str, np.ndarray]:
    """Global tensors from all ranks' pieces.

    Raises:
        AssertionError: two ranks hold different bits for the same place (a replica drifted), or
            some place is held by none.
    """
    whole: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    for name, shape, offset, values in itertools.chain.from_iterable(ranks):
        whole.setdefault(name, np.zeros(shape, np.float32))
        seen.setdefault(name, np.zeros(shape, bool))
        cut = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        known = seen[name][cut]
        assert np.array_equal(whole[name][cut][known], values[known]), f"{name}: replicas differ"
        whole[name][cut] = values
        seen[name][cut] = True
    for name, places in seen.items():
        assert places.all(), f"{name}: some of it is on no rank"
    return whole
