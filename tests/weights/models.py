"""Tiny models in memory, for the tests of sources, plans and sinks."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_btx.mix.btx import btx
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Model, Routing
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import MemorySource

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
    vocab_size=100,
)


def dense(label: str, seed: int, dtype=torch.float32, architecture=DENSE) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in canonical_tensors(architecture).items()
    }
    return Checkpoint(label, None, architecture, MemorySource(tensors))


def moe_plan(dtype=torch.float32, count: int = 4, source_dtype=torch.float32) -> Plan:
    models = [dense(f"model{i}", i, source_dtype) for i in range(count)]
    return btx(models, routing=Routing(), dtype=dtype, router=RouterInit(seed=5))


def tied(architecture: Architecture) -> Architecture:
    model = replace(architecture.model, untie_embeddings_and_output_weights=False)
    return replace(architecture, model=model)
