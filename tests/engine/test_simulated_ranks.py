"""Layouts of 512 and 1,024 ranks, without the ranks: engine/simulated_ranks.py builds the real
modules of one after another.

Only those are built that differ. A rank's part of an expert follows from its place in the expert
groups, its part of all else from that in the tensor-parallel group; both are counted through within
the first ``max(TP, ETP x EP)`` ranks of a pipeline stage, and the other ranks of it are copies of
these. Of the stages between the first and the last one is built, as each holds what the one before
it does, some layers on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import pytest

from megatron_btx.engine.model import model_chunks
from megatron_btx.engine.simulated_ranks import (
    Held,
    Piece,
    held,
    optimizer_bytes,
    rank,
    simulated_model,
)
from megatron_btx.recipe import count, memory
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout, Model, Routing, Training
from megatron_btx.train.freezing import FreezingSchedule

EXPERTS = tuple("abcdefgh")
LLAMA_7B = Model(num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32)
LLAMA_70B = Model(
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_query_groups=8,
)
TP2_EP8 = Layout(
    tensor_model_parallel_size=2,
    expert_model_parallel_size=8,
    expert_tensor_parallel_size=1,
    data_parallel_size=256,
)
TP8_PP8_EP8 = Layout(
    tensor_model_parallel_size=8,
    pipeline_model_parallel_size=8,
    virtual_pipeline_model_parallel_size=5,
    expert_model_parallel_size=8,
    expert_tensor_parallel_size=1,
    data_parallel_size=16,
)
JOBS = {
    "8 x 7B, TP2 x EP8 x DP256": (LLAMA_7B, TP2_EP8, 512),
    "8 x 70B, TP8 x PP8 x VP5 x EP8 x DP16": (LLAMA_70B, TP8_PP8_EP8, 1024),
}


def job(name: str) -> tuple[Architecture, Layout]:
    model, layout, ranks = JOBS[name]
    assert layout.world_size == ranks
    return Architecture(model=model, vocab_size=32000, experts=EXPERTS, routing=Routing()), layout


def _built(architecture: Architecture, layout: Layout) -> dict[int, list[Held]]:
    """Stage -> its first ranks."""
    pp, tp = layout.pipeline_model_parallel_size, layout.tensor_model_parallel_size
    in_stage = layout.world_size // pp
    first = max(tp, layout.etp * layout.expert_model_parallel_size)
    assert in_stage % first == 0
    return {
        stage: [
            held(architecture, Training(layout=layout), stage * in_stage + at)
            for at in range(first)
        ]
        for stage in sorted({0, min(1, pp - 1), pp - 1})
    }


def _moved(piece: Piece, layers: int) -> Piece:
    """The same of a later stage."""
    if not piece.key.startswith("decoder.layers."):
        return piece
    (layer, *offset), extent = piece.box
    return replace(piece, box=((layer + layers, *offset), extent))


@pytest.mark.parametrize("name", JOBS)
def test_every_element_is_where_it_belongs(name: str) -> None:
    architecture, layout = job(name)
    pp = layout.pipeline_model_parallel_size
    built = _built(architecture, layout)
    copies = layout.world_size // pp // len(built[0])
    per_piece = architecture.model.num_layers // pp // layout.chunks
    holders: dict[tuple[str, tuple[int, ...]], dict[object, list[bool]]] = defaultdict(dict)
    for stage in range(pp):
        source = stage if stage in built else 1
        for one in built[source]:
            assert one.stage == source
            for piece in one.pieces:
                here = _moved(piece, (stage - source) * per_piece)
                boxes = holders[here.key, here.shape]
                boxes.setdefault(here.box, []).append(here.is_written)
    written = 0
    for (key, shape), boxes in holders.items():
        replicas = {len(found) for found in boxes.values()}
        assert len(replicas) == 1, f"{key}: some of it is on more ranks than the rest"
        extents = {extent for _, extent in boxes}
        assert len(extents) == 1, key
        (extent,) = extents
        # Boxes of one size at multiples of it, all different, as many as there are: a tiling.
        for offset, _ in boxes:
            for at, size, whole in zip(offset, extent, shape, strict=True):
                assert at % size == 0, key
                assert at + size <= whole, key
        assert len(boxes) * math.prod(extent) == math.prod(shape), f"{key}: not all of it is held"
        expected = _replicas(key, layout)
        assert replicas.pop() * copies == expected, key
        assert all(sum(found) == 1 for found in boxes.values()), f"{key}: written by one rank"
        written += math.prod(shape)
    assert written == count.parameters(architecture).total
    names = {key for key, _ in holders}
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} < names


def _replicas(key: str, layout: Layout) -> int:
    """How many ranks hold the same of a tensor."""
    in_stage = layout.world_size // layout.pipeline_model_parallel_size
    if ".mlp.experts." in key:
        return in_stage // (layout.etp * layout.expert_model_parallel_size)
    whole = "norm" in key or "router" in key
    return in_stage // (1 if whole else layout.tensor_model_parallel_size)


@pytest.mark.parametrize("name", JOBS)
def test_a_rank_holds_what_the_plan_says(name: str) -> None:
    architecture, layout = job(name)
    pp = layout.pipeline_model_parallel_size
    in_stage = layout.world_size // pp
    for stage in {0, pp // 2, pp - 1}:
        one = held(
            architecture, Training(layout=layout), stage * in_stage + in_stage - 1
        )  # the last of its stage
        assert one.stage == stage
        assert one.parameters == memory.rank_parameters(architecture, layout, stage)


@pytest.mark.parametrize("name", JOBS)
def test_gradients_and_optimizer_shards_are_the_plans(name: str) -> None:
    """To the byte: nothing of these sizes is padded."""
    architecture, layout = job(name)
    training = Training(layout=layout, use_distributed_optimizer=True, tokens=10**9)
    planned = memory.stage_memory(architecture, training, 0)
    in_stage = layout.world_size // layout.pipeline_model_parallel_size
    for number in (0, in_stage - 1):
        with rank(layout, number):
            ddp, optimizer, _ = FreezingSchedule(architecture, training, architecture.model).begin(
                simulated_model(architecture, training), 0
            )
            gradients = sum(
                buffer.grad_data.nbytes
                for piece in model_chunks(ddp)
                for buffer in (*piece.buffers, *piece.expert_parallel_buffers)
            )
            assert gradients == planned.gradients
            assert optimizer_bytes(optimizer, training) == planned.optimizer
