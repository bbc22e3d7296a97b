"""Counts against independent oracles: the paper's figures, a built model, torch's FLOP counter."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Embedding, Linear, Module, ModuleList
from torch.utils.flop_counter import FlopCounterMode

from megatron_btx.recipe import count, freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Routing, Training

SMALL = Model(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=80,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=16,
    seq_length=32,
)
LLAMA_2_7B = Model(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, seq_length=4096
)
NAMES = ("math", "code", "wikipedia", "seed")


def mixture(model: Model, vocab: int = 32000, **routing: Any) -> Architecture:
    return Architecture(model=model, vocab_size=vocab, experts=NAMES, routing=Routing(**routing))


@pytest.mark.parametrize(
    ("routing", "active"), [("switch", "6.7"), ("topk", "11.1"), ("soft", "19.7")]
)
def test_table_4_of_the_paper(routing: Any, active: str) -> None:
    parameters = count.parameters(mixture(LLAMA_2_7B, type=routing))
    assert f"{parameters.active / 1e9:.1f}" == active
    assert f"{parameters.total / 1e9:.1f}" == "19.7"


def test_llama_2_7b() -> None:
    parameters = count.parameters(Architecture(model=LLAMA_2_7B, vocab_size=32000))
    assert parameters.total == parameters.active == 6_738_415_616  # the released model's
    assert parameters.vocab_padding == 0


def test_sample_top1_runs_every_expert_in_a_soft_first_layer() -> None:
    hard = mixture(LLAMA_2_7B, type="sample_top1", first_layer_soft=False)
    soft = mixture(LLAMA_2_7B, type="sample_top1", first_layer_soft=True)
    assert sum(count.experts_run(hard)) == 32
    assert sum(count.experts_run(soft)) == 31 + 4


class PlainModel(Module):
    """A Llama with every product written as one, norms and nonlinearities left out (they hold no
    matrix), heads and masks as in the textbook: the whole S x S is computed."""

    def __init__(self, architecture: Architecture, k: int | None) -> None:
        super().__init__()
        model, d = architecture.model, count.kv_channels(architecture.model)
        self.d, self.k = d, k
        h, f = model.hidden_size, model.ffn_hidden_size
        self.embedding = Embedding(architecture.padded_vocab_size, h)
        self.output = Linear(h, architecture.padded_vocab_size, bias=False)
        self.layers = ModuleList()
        for _ in range(model.num_layers):
            layer = Module()
            layer.q = Linear(h, model.num_attention_heads * d, bias=False)
            layer.k = Linear(h, count.query_groups(model) * d, bias=False)
            layer.v = Linear(h, count.query_groups(model) * d, bias=False)
            layer.o = Linear(model.num_attention_heads * d, h, bias=False)
            if architecture.experts:
                layer.router = Linear(h, len(architecture.experts), bias=False)
            layer.experts = ModuleList(
                ModuleList(
                    [Linear(h, f, bias=False), Linear(h, f, bias=False), Linear(f, h, bias=False)]
                )
                for _ in architecture.experts or (None,)
            )
            self.layers.append(layer)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)  # [S, H]
        for layer in self.layers:
            q, k, v = (
                m(x).view(len(x), -1, self.d).transpose(0, 1) for m in (layer.q, layer.k, layer.v)
            )
            repeats = len(q) // len(k)
            k, v = k.repeat_interleave(repeats, 0), v.repeat_interleave(repeats, 0)
            x = x + layer.o(((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1).flatten(1))
            if self.k is None:
                x = x + self.ffn(layer.experts[0], x)
                continue
            gates, chosen = layer.router(x).topk(self.k)
            out = torch.zeros_like(x)
            for i, expert in enumerate(layer.experts):
                row, which = (chosen == i).nonzero(as_tuple=True)
                gate = gates.softmax(-1)[row, which].unsqueeze(1)
                out = out.index_add(0, row, gate * self.ffn(expert, x[row]))
            x = x + out
        return self.output(x)

    def ffn(self, expert: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = expert
        return down(torch.nn.functional.silu(gate(x)) * up(x))


@pytest.mark.parametrize("k", [None, 1, 2, 4])
def test_flops_and_parameters_against_torch(k: int | None) -> None:
    architecture = Architecture(model=SMALL, vocab_size=100)
    if k is not None:
        types = {1: {"type": "switch"}, 2: {"type": "topk"}, 4: {"type": "soft"}}
        architecture = mixture(SMALL, 100, **types[k])
    assert architecture.padded_vocab_size == 128
    torch.manual_seed(0)
    plain = PlainModel(architecture, k)
    tokens = torch.randint(0, 100, (SMALL.seq_length,))
    with FlopCounterMode(display=False) as forward:
        loss = plain(tokens).square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = SMALL.seq_length * count.forward_flops_per_token(architecture)
    assert forward.get_total_flops() == flops
    assert forward.get_total_flops() + backward.get_total_flops() == (
        SMALL.seq_length * count.training_flops_per_token(architecture)
    )
    norms = (2 * SMALL.num_layers + 1) * SMALL.hidden_size
    parameters = count.parameters(architecture)
    assert parameters.total == norms + sum(p.numel() for p in plain.parameters())
    assert parameters.total - parameters.total_true_vocab == 2 * 28 * SMALL.hidden_size


def test_what_llamas_relatives_have_besides() -> None:
    """Parameters against built models: tests/families/test_families.py."""
    plain = Architecture(model=SMALL, vocab_size=100)
    windowed = replace(SMALL, window_size=(7, 0), window_attn_skip_freq=(1, 0, 1))
    relative = replace(windowed, add_qkv_bias=True, qk_layernorm=True)
    flops = [
        count.forward_flops_per_token(replace(plain, model=model))
        for model in (SMALL, windowed, relative)
    ]
    # Two layers in which a token sees 8 others instead of 32: scores and values, 96 wide.
    assert flops[0] - flops[1] == 2 * 4 * 96 * (32 - 8)
    assert flops[2] == flops[1], "biases and norms are no matrices"
    more = [count.parameters(replace(plain, model=m)).norms for m in (windowed, relative)]
    assert more[1] - more[0] == 3 * ((6 + 2 * 2) * 16 + 2 * 16), "a bias a row; two norms of 16"
    wide = replace(plain, model=replace(SMALL, window_size=(99, 0)))
    assert count.forward_flops_per_token(wide) == flops[0], "no token sees more than there are"
    moe = mixture(SMALL, 100, type="topk")
    shared = replace(
        SMALL,
        moe_ffn_hidden_size=40,
        moe_shared_expert_intermediate_size=24,
        moe_shared_expert_gate=True,
    )
    before, after = count.parameters(moe), count.parameters(replace(moe, model=shared))
    assert before.ffn - after.ffn == 3 * (4 * 3 * 48 * 40 - 3 * 48 * 24)
    assert before.ffn_active - after.ffn_active == 3 * (2 * 3 * 48 * 40 - 3 * 48 * 24)
    assert after.router - before.router == 3 * 48


def test_palms_rule_of_thumb() -> None:
    """6 N + 12 L H S, where N is everything but the embedding and the norms."""
    architecture = Architecture(model=LLAMA_2_7B, vocab_size=32000)
    parameters = count.parameters(architecture)
    matrices = parameters.total - parameters.embedding - parameters.norms
    assert count.training_flops_per_token(architecture) == 6 * matrices + 12 * 32 * 4096 * 4096


def test_tied_embeddings_count_once_but_multiply() -> None:
    tied = Architecture(
        model=Model(
            num_layers=1,
            hidden_size=8,
            ffn_hidden_size=16,
            num_attention_heads=2,
            untie_embeddings_and_output_weights=False,
        ),
        vocab_size=128,
    )
    parameters = count.parameters(tied)
    assert (parameters.embedding, parameters.output) == (1024, 0)
    assert count.forward_flops_per_token(tied) > 2 * 1024


def test_weights_are_shares() -> None:
    assert count.mixture({"a": 3, "b": 1, "c": 0}) == {"a": 0.75, "b": 0.25}


def test_steps_round_up() -> None:
    training = Training(tokens=1, global_batch_size=4)
    assert count.steps(training, SMALL) == 1
    assert count.trained_tokens(training, SMALL) == 4 * 32
    assert count.steps(Training(tokens=0), SMALL) == 0


PLAIN = Model(
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=16,
    make_vocab_size_divisible_by=64,
)
PLAIN_DENSE = Architecture(model=PLAIN, vocab_size=100)
COUNTED = {
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
    """Every matrix product of one sequence's forward pass on plain tensors: the counter sees
    neither the CPU's fused attention nor grouped products. The gradient of the first layer's input
    is asked for, whatever is frozen."""
    s, h, f, d = PLAIN.seq_length, PLAIN.hidden_size, PLAIN.ffn_hidden_size, 8
    heads, groups, vocab = 4, 2, 128

    def weight(*shape: int, kind: str = "") -> Tensor:
        return torch.randn(*shape, requires_grad=kind not in frozen.split())

    x = weight(s, h, kind="input")
    for layer in range(PLAIN.num_layers):
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


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize(
    "frozen", ["", "ffn", "experts", "embeddings attention norms experts head", "router head ffn"]
)
def test_flops_with_frozen_tensors_are_the_counters(name: str, frozen: str) -> None:
    routing = COUNTED[name]
    architecture = PLAIN_DENSE
    if routing is not None:
        names = ("code", "math", "prose", "seed")
        architecture = dataclasses.replace(PLAIN_DENSE, experts=names, routing=routing)
    with FlopCounterMode(display=False) as counter:
        loss = forward(routing, frozen)
    s = PLAIN.seq_length
    assert counter.get_total_flops() == s * count.forward_flops_per_token(architecture)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = counter.get_total_flops() + backward.get_total_flops()
    still = freezing.frozen(architecture, frozen.split())
    assert total == s * freezing.flops_per_token(architecture, still)
