"""Your own Megatron-Core script, with this project's spec, router and initializer in it.

    torchrun --nproc-per-node 2 examples/own_loop.py CHECKPOINT CHECKPOINT ...

mixes the dense checkpoints (Megatron `torch_dist` with our manifest) into one MoE whose experts lie
on all ranks, and takes a few steps on random tokens. No recipe, no trainer of ours.
"""

import argparse
import functools
import os
from pathlib import Path

import torch

from megatron_btx.engine import cpu, kernels, repairs

cpu.install()  # before any other import of Megatron; does nothing where there is a GPU
repairs.install(kernels.detect())  # does nothing where Transformer Engine is

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_btx.engine.initializer import btx_plan, initialize  # noqa: E402
from megatron_btx.engine.router import transformer_fields  # noqa: E402
from megatron_btx.engine.spec import block_spec  # noqa: E402
from megatron_btx.recipe.schema import Mix, Routing  # noqa: E402


def forward(batches, model):
    """Megatron's forward_step_func."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, lambda out: (out.mean(), {"loss": out.mean().detach().clone()})


def main(checkpoints: list[Path], steps: int) -> None:
    """Mix, then train."""
    gpu = torch.cuda.is_available()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    world = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
    tensor_parallel.model_parallel_cuda_manual_seed(1)

    routing = Routing(type="topk", moe_router_topk=2, balance_loss_coeff=0.01)
    named = [(path.name, path) for path in checkpoints]
    plan = btx_plan(named, mix=Mix(), routing=routing, precision="fp32", random_seed=1)
    shape, experts = plan.architecture.model, len(checkpoints)
    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        layernorm_epsilon=shape.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        expert_model_parallel_size=world,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=True,
        **transformer_fields(routing, experts),
    )
    model = GPTModel(
        config,
        block_spec(config, routing),
        plan.architecture.padded_vocab_size,
        shape.seq_length,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
    ).to(torch.cuda.current_device())
    initialize(model, plan)  # each rank reads the feed-forward layers of its own experts only

    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, clip_grad=1.0), [ddp])
    draw = functools.partial(torch.randint, plan.architecture.vocab_size)
    batch = draw((2, shape.seq_length + 1), device=torch.cuda.current_device())
    for step in range(steps):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        (out,) = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([batch]),
            model=[ddp],
            num_microbatches=1,
            seq_length=shape.seq_length,
            micro_batch_size=len(batch),
            forward_only=False,
        )
        _, grad_norm, _ = optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step}: loss {out['loss'].item():.4f}, gradient norm {grad_norm:.3f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Mix dense checkpoints into an MoE and train it.")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.checkpoints, arguments.steps)
