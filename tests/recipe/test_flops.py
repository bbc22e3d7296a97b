"""The FLOPs formula against PyTorch's counter, on a plain model of matrix products only: it sees
neither the CPU's fused attention nor grouped products."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_btx.recipe import count, freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Routing

MODEL = Model(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=16,
    make_vocab_size_divisible_by=64,
)
DENSE = Architecture(model=MODEL, vocab_size=100)
ROUTINGS = {
    "dense": None,
    "top2": Routing(type="topk", moe_router_topk=2),
    "switch": Routing(type="switch"),
    "sample_top1": Routing(type="sample_top1"),
    "soft": Routing(type="soft"),
}


def experts_of(routing: Routing | None, layer: int) -> int:
    """Experts that a token runs through in a layer, read off the paper (section 3.3)."""
    if routing is None:
        return 1
    if routing.type == "soft" or (routing.type == "sample_top1" and layer == 0):
        return 4
    return routing.moe_router_topk if routing.type == "topk" else 1


def forward(routing: Routing | None, frozen: str) -> Tensor:
    """Every matrix product of one sequence's forward pass, written out; the gradient of the first
    layer's input is asked for, whatever is frozen."""
    s, h, f, d = MODEL.seq_length, MODEL.hidden_size, MODEL.ffn_hidden_size, 8
    heads, groups, vocab = 4, 2, 128

    def weight(*shape: int, kind: str = "") -> Tensor:
        return torch.randn(*shape, requires_grad=kind not in frozen.split())

    x = weight(s, h, kind="input")
    for layer in range(MODEL.num_layers):
        q, k, v = (x @ weight(h, n * d, kind="attention") for n in (heads, groups, groups))
        per_head = [part.reshape(s, -1, d).transpose(0, 1) for part in (q, k, v)]
        q, k, v = (p.repeat_interleave(heads // len(p), 0) for p in per_head)
        attended = (q @ k.transpose(1, 2)) @ v
        projection = weight(heads * d, h, kind="attention")
        x = attended.transpose(0, 1).reshape(s, heads * d) @ projection
        if routing is not None:
            x = x + (x @ weight(h, 4, kind="router")).sum(1, keepdim=True)
        outputs = []
        for _ in range(experts_of(routing, layer)):
            ffn = "ffn" if routing is None else "experts"
            gate, up = (x @ weight(h, f, kind=ffn) for _ in range(2))
            outputs.append((gate * up) @ weight(f, h, kind=ffn))
        x = torch.stack(outputs).sum(0)
    return (x @ weight(h, vocab, kind="head")).sum()


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(
    "frozen", ["", "ffn", "experts", "embeddings attention norms experts head", "router head ffn"]
)
def test_against_the_counter(name: str, frozen: str) -> None:
    routing = ROUTINGS[name]
    architecture = DENSE
    if routing is not None:
        names = ("code", "math", "prose", "seed")
        architecture = dataclasses.replace(DENSE, experts=names, routing=routing)
    with FlopCounterMode(display=False) as counter:
        loss = forward(routing, frozen)
    s = MODEL.seq_length
    assert counter.get_total_flops() == s * count.forward_flops_per_token(architecture)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = counter.get_total_flops() + backward.get_total_flops()
    still = freezing.frozen(architecture, frozen.split())
    assert total == s * freezing.flops_per_token(architecture, still)
