"""GroupedExperts beside Megatron's SequentialMLP, and an MoE beside the dense models it holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_btx.recipe.schema import Layout, Routing
from tests.engine.harness import DENSE, MOE, named_tensor, set_weights
from tests.ranks import Ranks

LAYOUTS = {
    "one rank": Layout(),
    "ep2": Layout(data_parallel_size=2, expert_model_parallel_size=2),
    "etp2": Layout(tensor_model_parallel_size=2, expert_tensor_parallel_size=2),
}
PREFIX = "decoder.layers.mlp.experts."


def move_between(layout: Layout, folder: Path) -> dict[str, Any]:
    """Save ours, load it into Megatron's, save that, load it into ours again."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import transformer_config
    from megatron_btx.engine.moe.experts import GroupedExperts

    distributed.initialize(layout, 1)
    config = transformer_config(MOE, layout, "fp32")
    config.bias_activation_fusion = False  # Megatron's own SwiGLU in its own experts
    groups = get_default_pg_collection()
    count = 4 // layout.expert_model_parallel_size
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)

    def sharded(module: Any) -> dict[str, Any]:
        metadata = {
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        found = module.sharded_state_dict(prefix=PREFIX, metadata=metadata)
        # Transformer Engine's, tied to a layout; SequentialMLP has an empty one.
        return {key: value for key, value in found.items() if "_extra_state" not in key}

    def load(module: Any, name: str) -> None:
        loaded = dist_checkpointing.load(sharded(module), str(folder / name))
        named = {key.removeprefix(PREFIX): value for key, value in loaded.items()}
        left_out = module.load_state_dict(named, strict=False)
        assert not left_out.unexpected_keys
        assert all("_extra_state" in key for key in left_out.missing_keys)

    def save(module: Any, name: str) -> None:
        if torch.distributed.get_rank() == 0:
            (folder / name).mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(sharded(module), str(folder / name))

    ours = GroupedExperts(count, config, None, groups)
    rank = torch.distributed.get_rank()
    with torch.no_grad():
        for name, param in ours.named_parameters():
            param.copy_(named_tensor(f"{rank} {name}", tuple(param.shape)))
    theirs = SequentialMLP(count, config, linears, groups)
    save(ours, "ours")
    load(theirs, "ours")
    fc1 = torch.stack([expert.linear_fc1.weight for expert in theirs.local_experts])
    fc2 = torch.stack([expert.linear_fc2.weight for expert in theirs.local_experts])
    same = torch.equal(fc1, ours.linear_fc1.weight) and torch.equal(fc2, ours.linear_fc2.weight)

    rows = torch.tensor([3, 0, 4, 1][:count])
    tokens, gates = named_tensor("x", (int(rows.sum()), 32)), named_tensor("p", (int(rows.sum()),))
    with torch.no_grad():
        outputs = [module(tokens, rows, gates)[0].numpy() for module in (ours, theirs)]

    save(theirs, "theirs")
    again = GroupedExperts(count, config, None, groups)
    load(again, "theirs")
    back = all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True)
    )
    return {"same": same, "back": back, "outputs": outputs}


@pytest.mark.parametrize("name", LAYOUTS)
def test_to_megatrons_experts_and_back_bit_for_bit(name: str, ranks: Ranks, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    for rank in ranks.run(move_between, layout.world_size, layout, tmp_path):
        assert rank["same"]
        assert rank["back"]
        mine, theirs = rank["outputs"]
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def logits_of(routing: Routing | None, experts: list[int], forced: int | None) -> np.ndarray:
    """Logits of the dense model whose FFN is number ``experts[0]``, or of the MoE of these FFNs."""
    import contextlib

    from megatron_btx.engine import distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.engine.moe.router import forced_routing

    distributed.initialize(Layout(), 1)
    architecture = DENSE
    if routing is not None:
        architecture = replace(MOE, routing=routing, experts=tuple(map(str, experts)))
    model = build_model(architecture, Layout(), "fp32").eval()
    set_weights(model)
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers):
            layer.input_layernorm.weight.copy_(named_tensor(f"norm {number} in", (32,)))
            layer.pre_mlp_layernorm.weight.copy_(named_tensor(f"norm {number} mlp", (32,)))
            ffns = [
                (
                    named_tensor(f"{number} fc1 {expert}", (96, 32)),
                    named_tensor(f"{number} fc2 {expert}", (32, 48)),
                )
                for expert in experts
            ]
            if routing is None:
                layer.mlp.linear_fc1.weight.copy_(ffns[0][0])
                layer.mlp.linear_fc2.weight.copy_(ffns[0][1])
            else:
                layer.mlp.experts.linear_fc1.weight.copy_(torch.stack([fc1 for fc1, _ in ffns]))
                layer.mlp.experts.linear_fc2.weight.copy_(torch.stack([fc2 for _, fc2 in ffns]))
        tokens = torch.arange(48).view(3, 16) * 7 % 120
        positions = torch.arange(16).expand(3, -1)
        within = contextlib.nullcontext() if forced is None else forced_routing(model, forced)
        with within:
            return model(tokens, positions, None).numpy()


ROUTINGS = {"topk": Routing(), "top3": Routing(moe_router_topk=3), "soft": Routing(type="soft")}
# Gates sum to one but for fp32 rounding, and the experts' outputs are added up: 6e-8 an operation,
# over four layers and logits of about 1.
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("name", ROUTINGS)
def test_equal_experts_are_the_dense_model(name: str, ranks: Ranks) -> None:
    dense = ranks.run(logits_of, 1, None, [2], None)[0]
    mixture = ranks.run(logits_of, 1, ROUTINGS[name], [2, 2, 2, 2], None)[0]
    np.testing.assert_allclose(mixture, dense, **NEAR)


def test_forced_routing_is_that_experts_ffn(ranks: Ranks) -> None:
    for place, expert in enumerate([5, 3, 1, 4]):
        dense = ranks.run(logits_of, 1, None, [expert], None)[0]
        forced = ranks.run(logits_of, 1, Routing(), [5, 3, 1, 4], place)[0]
        np.testing.assert_allclose(forced, dense, **NEAR)
