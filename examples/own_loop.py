"""Your own Megatron-Core script, with this project's layer spec, router and initializer in it.

    torchrun --nproc-per-node 2 examples/own_loop.py code=DIR math=DIR wiki=DIR seed=DIR

mixes dense checkpoints (Megatron's or Hugging Face's; as many or some times as many as ranks) into
one MoE whose experts lie on all ranks, and takes a few steps on random tokens, with no recipe.
"""

import os
import sys

import torch

import megatron_btx as mb

mb.install()  # before any other import of Megatron

from megatron.core import distributed, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402


def forward(batches, model):
    """Megatron's forward_step_func: next-token loss of a batch [B, S + 1]."""
    tokens = next(batches)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(len(tokens), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, lambda out: (out.mean(), {"loss": out.mean().detach().clone()})


torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
world = torch.distributed.get_world_size()
parallel_state.initialize_model_parallel(expert_model_parallel_size=world)
tensor_parallel.model_parallel_cuda_manual_seed(1)

# The plan of the mix, a GPTModel of its shape, and this rank's shards of it.
models = [mb.open_checkpoint(path, name) for name, path in (a.split("=", 1) for a in sys.argv[1:])]
routing = mb.Routing(type="topk", moe_router_topk=2, balance_loss_coeff=0.01)
plan = mb.mix_plan(models, mix=mb.Mix(), routing=routing, dtype=torch.float32, random_seed=1)
layout = mb.Layout(data_parallel_size=world, expert_model_parallel_size=world)
model = mb.build_model(plan.architecture, layout, "fp32")
mb.initialize(model, plan)  # a rank reads its own experts only

ddp_config = distributed.DistributedDataParallelConfig()
ddp = distributed.DistributedDataParallel(model.config, ddp_config, model)
model.config.finalize_model_grads_func = distributed.finalize_model_grads
optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, clip_grad=1.0), [ddp])
size = plan.architecture.model.seq_length
batch = torch.randint(plan.architecture.vocab_size, (2, size + 1)).to(torch.cuda.current_device())
schedule = {"forward_step_func": forward, "model": [ddp], "num_microbatches": 1}
schedule |= {"seq_length": size, "micro_batch_size": 2, "forward_only": False}
for step in range(5):
    ddp.zero_grad_buffer()
    optimizer.zero_grad()
    (out,) = get_forward_backward_func()(data_iterator=iter([batch]), **schedule)
    _, grad_norm, _ = optimizer.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step}: loss {out['loss'].item():.4f}, gradient norm {grad_norm:.3f}")
torch.distributed.destroy_process_group()
