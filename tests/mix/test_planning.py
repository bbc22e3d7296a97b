"""A plan is arithmetic on names: it needs no tensor, and little time."""

from __future__ import annotations

import time

import torch

from megatron_btx.mix.btx import btx
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import parameters
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Model, Routing
from megatron_btx.weights.megatron import stored
from megatron_btx.weights.ops import nbytes, takes
from megatron_btx.weights.plan import Checkpoint

LLAMA_70B = Architecture(
    model=Model(
        num_layers=80,
        hidden_size=8192,
        ffn_hidden_size=28672,
        num_attention_heads=64,
        num_query_groups=8,
    ),
    vocab_size=32000,
)


class Names:
    """A source of which nothing can be read."""

    bytes_read = 0
    stamp = ""

    def __init__(self) -> None:
        shapes = canonical_tensors(LLAMA_70B)
        self.tensors = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}

    def read(self, name, box):
        raise AssertionError("a plan reads nothing")

    def changed(self):
        return []

    files = changed


def test_eight_models_of_70b_are_planned_in_seconds():
    start = time.process_time()
    models = [Checkpoint(f"m{i}", None, LLAMA_70B, Names()) for i in range(8)]
    plan = btx(models, routing=Routing(), dtype=torch.bfloat16)
    described = plan.describe()
    for key, shape in (
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (80, 8, 57344, 8192)),
        ("decoder.layers.self_attention.linear_qkv.weight", (80, 10240, 8192)),
    ):
        assert stored(key, shape, plan.targets).shape == shape
    assert time.process_time() - start < 10
    assert plan.nbytes == 2 * parameters(plan.architecture).total_true_vocab
    expert = plan.targets["decoder.layers.79.mlp.experts.7.linear_fc1.weight"]
    assert [take.source for take in takes(expert)] == ["m7"]
    assert f"{80 * nbytes(expert):,} bytes" in described
