"""Your own Megatron-Core script, with this project's spec, router and initializer in it.

    torchrun --nproc-per-node 2 examples/own_loop.py CHECKPOINT CHECKPOINT ...

mixes dense checkpoints (Megatron `torch_dist` with our manifest) into one MoE whose experts lie on
all ranks, and takes a few steps on random tokens. No recipe, no trainer of ours.
"""

import os
import sys
from pathlib import Path

import torch

from megatron_btx.engine import cpu, mcore_patches, platform

cpu.install()  # before any other import of Megatron; does nothing where there is a GPU
mcore_patches.install(platform.detect())  # does nothing where Transformer Engine and Apex are

from megatron.core import distributed, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

from megatron_btx.engine.initializer import btx_plan, initialize  # noqa: E402
from megatron_btx.engine.model import mask_padding, model_fields, transformer_config  # noqa: E402
from megatron_btx.engine.spec import block_spec  # noqa: E402
from megatron_btx.recipe.schema import Layout, Mix, Routing  # noqa: E402


def forward(batches, model):
    """Megatron's forward_step_func."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, lambda out: (out.mean(), {"loss": out.mean().detach().clone()})


torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
world = torch.distributed.get_world_size()
parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
tensor_parallel.model_parallel_cuda_manual_seed(1)

# The plan of the mix, and a model of its shape: Megatron's own, with our layers and router in it.
routing = Routing(type="topk", moe_router_topk=2, balance_loss_coeff=0.01)
models = [(Path(path).name, Path(path)) for path in sys.argv[1:]]
plan = btx_plan(models, mix=Mix(), routing=routing, precision="fp32", random_seed=1)
layout = Layout(data_parallel_size=world, expert_model_parallel_size=world)
config = transformer_config(plan.architecture, layout, "fp32")  # a TransformerConfig
model = GPTModel(config, block_spec(config, routing), **model_fields(plan.architecture))
mask_padding(model, plan.architecture)
initialize(model.to(torch.cuda.current_device()), plan)  # a rank reads its own experts only

ddp = distributed.DistributedDataParallel(
    config, distributed.DistributedDataParallelConfig(), model
)
config.finalize_model_grads_func = distributed.finalize_model_grads
optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, clip_grad=1.0), [ddp])
shape = (2, plan.architecture.model.seq_length + 1)
batch = torch.randint(plan.architecture.vocab_size, shape, device=torch.cuda.current_device())
for step in range(5):
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    (out,) = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([batch]),
        model=[ddp],
        num_microbatches=1,
        seq_length=batch.shape[1] - 1,
        micro_batch_size=len(batch),
        forward_only=False,
    )
    _, grad_norm, _ = optimizer.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {out['loss'].item():.4f}, gradient norm {grad_norm:.3f}")
torch.distributed.destroy_process_group()
