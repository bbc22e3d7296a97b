"""NVIDIA's own trainer, ``megatron.training`` of the 0.19.2 wheel, on gloo ranks of a CPU.

Its parser, its model builder, its ``load_checkpoint`` and ``save_checkpoint``, its optimizer; of
``pretrain`` itself only the loop is written here, for it wants a data set and a GPU. What stands in
for what it cannot have on a CPU is listed in :func:`_on_a_cpu`.

    python -m tests.megatron_lm.trainer ARGUMENTS

takes ``--train-iters`` steps on random tokens on one rank, for want of a GPU in the place of
``torchrun pretrain_gpt.py ARGUMENTS``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = importlib.util.find_spec("megatron.training") is not None
WHY = "NVIDIA's trainer comes in the wheel of megatron-core 0.19 (Python 3.12)"

# A run's own choices, none of which decides the model; the kernels that a CPU has.
CHOICES = shlex.split("""
--micro-batch-size 2 --global-batch-size 4 --train-iters 10 --lr 1e-3 --lr-decay-iters 10
--distributed-backend gloo --transformer-impl local --attention-backend unfused
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-masked-softmax-fusion
--no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion
--ckpt-assume-constant-structure --no-one-logger --save-interval 3
""")


@dataclass(frozen=True)
class Job:
    """One start of the trainer."""

    words: Sequence[str]
    """Its arguments, ``CHOICES`` apart."""
    tokens: Tensor
    """[batch, sequence + 1]: what losses are measured on, and by default each micro-batch of the
    training."""
    steps: int = 0
    batches: Tensor | None = None
    """[steps, global batch, sequence + 1] to train on instead."""
    forms: Sequence[str] = ("torch_dist",)
    """What `--ckpt-format` says; a second one is saved to the directory of its name."""
    compute: bool = True
    """Whether losses are: not where a rank has a part of the layers."""
    by_hand: dict[str, Any] = field(default_factory=dict)
    """What its ``GPTModelConfig`` must be told beside the arguments."""


@dataclass(frozen=True)
class Outcome:
    """What a rank saw."""

    before: Tensor
    """The loss of every token of the loaded model [batch, sequence]."""
    losses: tuple[float, ...]
    """Of the training's steps, the mean over this rank's micro-batches."""
    after: Tensor
    """As ``before``, after them."""
    iteration: int


def run(job: Job) -> Outcome:
    """Load, compute, train and save; called on every rank."""
    args = _start(job.words)
    models = _build(args, job)
    from megatron.training import checkpointing
    from megatron.training.training import update_use_dist_ckpt

    optimizer = schedule = None
    if job.steps:
        optimizer, schedule = _optimizer(args, models)
    iteration = 0
    if args.load:
        iteration, _ = checkpointing.load_checkpoint(models, optimizer, schedule, strict=True)
    before = _loss_of_tokens(models[0], job.tokens) if job.compute else job.tokens
    batches = job.batches
    if batches is None:
        batches = job.tokens.repeat(args.global_batch_size // len(job.tokens), 1)
        batches = batches.expand(job.steps, -1, -1)
    assert len(batches) == job.steps
    losses = tuple(_step(args, models, optimizer, schedule, batch) for batch in batches)
    after = _loss_of_tokens(models[0], job.tokens) if job.steps else before
    if args.use_megatron_fsdp:
        _all_states(optimizer)
    for form in job.forms if args.save else ():
        args.ckpt_format = form
        update_use_dist_ckpt(args)
        checkpointing.save_checkpoint(iteration + job.steps, models, optimizer, schedule, 0)
        args.save = str(Path(args.save).parent / job.forms[-1])
    return Outcome(before, losses, after, iteration)


_REPLACED: set[Any] = set()


def _on_a_cpu() -> None:
    """What it asks of CUDA, and of a checkout of its repository."""
    from megatron.core.datasets import utils
    from megatron.core.distributed import TorchFullyShardedDataParallel
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import (
        FullyShardedDataParallel,
        MegatronFSDP,
    )
    from megatron.training import arguments, checkpointing, initialize

    from megatron_btx.engine import cpu

    arguments.get_device_arch_version = lambda: 10
    utils.compile_helpers = lambda: None  # the wheel has them built, and no Makefile
    initialize._set_random_seed = lambda *_, **__: None
    torch.cuda.Event = cpu._Stream  # what fully sharded ranks record and wait for
    cpu._Stream.record = cpu._Stream.wait = cpu._Stream.wait_event = lambda *_: None
    for function, device in (
        (TorchFullyShardedDataParallel.__init__, {"cuda": "cpu"}),
        (checkpointing.read_metadata, {"cuda": "cpu"}),
        (FullyShardedDataParallel.__init__, {"cuda:": ""}),  # before "cpu", the current device
        (FullyShardedDataParallel._init_dist_index, {"cuda": "cpu"}),
        (MegatronFSDP.__init__, {"cuda:": ""}),
    ):
        if function not in _REPLACED:
            cpu._replace_literals(function, device, function.__qualname__)
            _REPLACED.add(function)


def refusal(words: Sequence[str], function: str) -> str:
    """What a function for ``--spec`` says of the arguments, before a model is built."""
    from megatron.training import global_vars
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_btx.errors import UserError

    module = "megatron_btx.engine.megatron_lm_spec"
    if not hasattr(importlib.import_module(module), function):
        module = "tests.megatron_lm.test_spec"
    args = _parsed([*words, "--spec", module, function])
    global_vars.set_args(args)
    config = gpt_config_from_args(args)
    try:
        config.transformer_layer_spec(config)
    except UserError as error:
        return str(error)
    return ""


def _parsed(words: Sequence[str]) -> Namespace:
    from megatron.core import rerun_state_machine
    from megatron.training import arguments, checkpointing, global_vars

    _on_a_cpu()
    global_vars.unset_global_variables()
    rerun_state_machine.destroy_rerun_state_machine()
    checkpointing._CHECKPOINT_VERSION = None
    sys.argv = ["pretrain_gpt.py", *CHOICES, *words]
    args: Namespace = arguments.parse_and_validate_args()
    return args


def _start(words: Sequence[str]) -> Namespace:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.training import initialize

    args = _parsed(words)
    torch.distributed.init_process_group(
        "gloo",
        init_method=os.environ["BTX_INIT_METHOD"],
        rank=args.rank,
        world_size=args.world_size,
    )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed, force_reset_rng=True)
    initialize.initialize_megatron(allow_no_cuda=True)
    return args


def _build(args: Namespace, job: Job) -> list[Any]:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder
    from megatron.training.training import get_megatron_ddp_config

    config = gpt_config_from_args(args)
    for name, value in job.by_hand.items():
        setattr(config, name, value)
    return GPTModelBuilder(config).build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=get_megatron_ddp_config(args)
        if args.use_torch_fsdp2 or args.use_megatron_fsdp
        else DistributedDataParallelConfig(
            use_distributed_optimizer=args.use_distributed_optimizer
        ),
        use_torch_fsdp2=args.use_torch_fsdp2,
        use_megatron_fsdp=args.use_megatron_fsdp,
        wrap_with_ddp=job.steps > 0,
        data_parallel_random_init=False,  # as its own default is
        mixed_precision_wrapper=Float16Module if args.bf16 else None,
    )


def _optimizer(args: Namespace, models: list[Any]) -> tuple[Any, Any]:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import (
        get_megatron_optimizer_config,
        get_optimizer_param_scheduler,
    )

    config, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(config, models, config_overrides=overrides)
    models[0].config.finalize_model_grads_func = finalize_model_grads
    return optimizer, get_optimizer_param_scheduler(optimizer)


def _all_states(optimizer: Any) -> None:
    """As Transformer Engine's Adam has them: of a parameter whose rows are all another rank's too.
    Ranks that save other names than each other wait for ever."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for parameter in itertools.chain(*(group["params"] for group in each.param_groups)):
            state = each.optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                state.setdefault(name, torch.zeros_like(parameter))


def _inputs(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Tokens, positions, mask (true: hidden) and labels."""
    from megatron.training import get_args

    length = tokens.shape[1] - 1
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    hidden = None
    if get_args().create_attention_mask_in_dataloader:
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return inputs, torch.arange(length).expand_as(inputs), hidden, labels


@torch.no_grad()
def _loss_of_tokens(model: Any, tokens: Tensor) -> Tensor:
    inputs, positions, hidden, labels = _inputs(tokens)
    model.eval()
    return model(inputs, positions, hidden, labels=labels).float()


def _step(
    args: Namespace, models: list[Any], optimizer: Any, schedule: Any, batch: Tensor
) -> float:
    """One step of ``train``: this rank's micro-batches of a global batch, as its sampler deals
    them."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    args.curr_iteration = args.consumed_train_samples // args.global_batch_size
    ranks, size = parallel_state.get_data_parallel_world_size(), args.micro_batch_size
    mine = batch.split(size)[parallel_state.get_data_parallel_rank() :: ranks]

    def forward(micro_batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Any]:
        inputs, positions, hidden, labels = _inputs(next(micro_batches))

        def loss_of(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.clone().detach()}

        return model(inputs, positions, hidden, labels=labels), loss_of

    models[0].train()
    models[0].zero_grad_buffer()
    optimizer.zero_grad()
    reported = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(mine),
        model=models,
        num_microbatches=len(mine),
        seq_length=batch.shape[1] - 1,
        micro_batch_size=size,
        forward_only=False,
    )
    updated, _, _ = optimizer.step()
    assert updated
    schedule.step(increment=args.global_batch_size)
    args.consumed_train_samples += args.global_batch_size
    return sum(float(each["loss"]) for each in reported) / len(reported)


def main() -> None:
    """The command above."""
    from megatron_btx.engine import cpu

    asked = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("--seq-length", "--vocab-size", "--train-iters"):
        asked.add_argument(name, type=int, required=True)
    given, _ = asked.parse_known_args()
    words = sys.argv[1:]
    cpu.install()
    tokens = torch.randint(given.vocab_size, (2, given.seq_length + 1))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ["BTX_INIT_METHOD"] = f"file://{folder}/ranks"
        outcome = run(Job(words, tokens, given.train_iters))
        torch.distributed.destroy_process_group()
    sys.stdout.write(f"losses of its steps: {outcome.losses}\n")


if __name__ == "__main__":
    main()
