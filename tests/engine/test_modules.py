"""Our modules and functions, each against an independent reference in float64 or Megatron's own.

Tolerances: fp32 results differ from float64 by some roundings of 6e-8 a term, bf16 ones of 4e-3.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd import gradcheck

from megatron_btx.data.boundaries import document_begins
from megatron_btx.engine import cpu_tuning
from megatron_btx.engine.moe import dispatch
from megatron_btx.engine.moe.expert_products import feed_forward
from megatron_btx.engine.ops import attention as attention_module
from megatron_btx.engine.ops import cpu_attention, swiglu
from megatron_btx.engine.ops.attention import ScaledDotProductAttention
from megatron_btx.engine.ops.cross_entropy import cross_entropy
from megatron_btx.engine.ops.norm import RMSNorm
from megatron_btx.engine.ops.rotary import split_and_rotate
from megatron_btx.engine.optimizer import Adam

FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: {"rtol": 1e-5, "atol": 1e-5}, BF16: {"rtol": 2e-2, "atol": 4e-2}}
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def draw(seed: int, *shape: int, dtype: torch.dtype = FP32) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def exact(*tensors: Tensor) -> list[Tensor]:
    """The same values in float64, as leaves."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def agree(ours: Any, inputs: tuple[Tensor, ...], theirs: Any, dtype: torch.dtype) -> None:
    """Outputs and gradients of ``ours(*inputs)`` against ``theirs`` in float64."""
    reference = exact(*inputs)
    out, expected = ours(*inputs), theirs(*reference)
    assert out.shape == expected.shape
    pull = draw(99, *out.shape)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
    mine = torch.autograd.grad(out, inputs, pull.detach().to(out.dtype))
    right = torch.autograd.grad(expected, reference, pull.detach().to(out.dtype).double())
    for found, wanted, leaf in zip(mine, right, inputs, strict=True):
        assert found.dtype == leaf.dtype
        scale = float(wanted.abs().amax()) or 1.0 if wanted.numel() else 1.0
        torch.testing.assert_close(found.double() / scale, wanted / scale, **TOLERANCE[dtype])


@dtypes
def test_rms_norm(dtype: torch.dtype) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    norm = RMSNorm(config, 32, eps=1e-3)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    agree(ours, (draw(0, 5, 3, 32, dtype=dtype), draw(1, 32, dtype=dtype)), reference, dtype)


def test_rms_norm_marks_its_weight_for_sequence_parallelism() -> None:
    for on in (False, True):
        config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
        config.sequence_parallel = on
        assert RMSNorm(config, 32).weight.sequence_parallel is on


def attention(**fields: Any) -> ScaledDotProductAttention:
    defaults = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4}
    config = TransformerConfig(**defaults | {"attention_dropout": 0.0} | fields)
    return ScaledDotProductAttention(config, 1, AttnMaskType.causal, "self")


@pytest.fixture(params=["one block", "many", "torch's kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's, and the one that a GPU without Transformer Engine uses."""
    if request.param == "many":
        monkeypatch.setattr(cpu_attention, "BLOCK_ELEMENTS", 64 * 150)
    if request.param == "torch's kernel":
        monkeypatch.setattr(attention_module, "_by_products", attention_module._fused)


@dtypes
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("seq", "window"),
    [(7, None), (60, 20), (150, None), (7, 2), (150, 5), (150, 64), (150, 149), (1, None)]
    + [(300, None), (300, 40)],  # too long to keep the gates
)
@pytest.mark.usefixtures("kernel")
def test_attention(groups: int, seq: int, window: int | None, dtype: torch.dtype) -> None:
    module = attention(num_query_groups=groups, window_size=None if window is None else (window, 0))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, None)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(4 // groups, dim=2) for x in (k, v))
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) / 8**0.5
        seen = torch.ones(seq, seq).tril().bool()
        if window is not None:
            seen &= torch.ones(seq, seq).triu(-window).bool()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)

    inputs = (
        draw(0, seq, 2, 4, 8, dtype=dtype),
        draw(1, seq, 2, groups, 8, dtype=dtype),
        draw(2, seq, 2, groups, 8, dtype=dtype),
    )
    agree(ours, inputs, reference, dtype)


@dtypes
@pytest.mark.parametrize(("seq", "window"), [(60, None), (150, 20), (300, None), (1, None)])
@pytest.mark.usefixtures("kernel")
def test_attention_within_documents(seq: int, window: int | None, dtype: torch.dtype) -> None:
    """Against float64 with Megatron's own mask; some documents end with a block, one is a token."""
    tokens = torch.randint(2, 9, (2, seq), generator=torch.Generator().manual_seed(3))
    tokens[0, [place for place in (0, 6, 31, 63, 64, 127, seq - 1) if place < seq]] = 1
    module = attention(num_query_groups=2, window_size=None if window is None else (window, 0))
    begins = document_begins(tokens, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return module(q, k, v, begins)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        hidden = torch.stack([
            _get_ltor_masks_and_position_ids(row, 1, False, True, False, True)[0] for row in tokens
        ])  # fmt: skip
        if window is not None:
            hidden = hidden | torch.ones(seq, seq).tril(-window - 1).bool()
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) / 8**0.5
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)

    shapes = ((seq, 2, 4, 8), (seq, 2, 2, 8), (seq, 2, 2, 8))
    inputs = tuple(draw(seed, *shape, dtype=dtype) for seed, shape in enumerate(shapes))
    agree(ours, inputs, reference, dtype)
    with pytest.raises(ValueError, match="a mask other"):
        module(*inputs, torch.ones(1, 1, seq, seq, dtype=torch.bool))


def test_attention_refuses_what_it_does_not_compute() -> None:
    for fields in ({"attention_dropout": 0.1}, {"window_size": (4, 1)}):
        with pytest.raises(ValueError, match="needs Transformer Engine"):
            attention(**fields)
    config = attention().config
    with pytest.raises(ValueError, match="a mask other"):
        ScaledDotProductAttention(config, 1, AttnMaskType.padding, "self")


def angles(seq: int, width: int) -> Tensor:
    """As Megatron's RotaryEmbedding hands them over: [S, 1, 1, D]."""
    half = torch.outer(torch.arange(seq).float(), 10.0 ** (-torch.arange(0, width, 2) / width))
    return torch.cat([half, half], -1)[:, None, None]


@dtypes
@pytest.mark.parametrize(("groups", "repeats"), [(1, 1), (2, 2), (3, 1)])
def test_rotary(groups: int, repeats: int, dtype: torch.dtype) -> None:
    turn = angles(6, 8)

    def ours(mixed: Tensor) -> Tensor:
        return torch.cat(split_and_rotate(mixed, turn, turn, [8 * repeats, 8, 8]), 2)

    def reference(mixed: Tensor) -> Tensor:
        heads = mixed.view(6, 2, groups, repeats + 2, 8)
        number = torch.complex(heads[..., :4], heads[..., 4:])
        turned = number * torch.polar(torch.ones(()).double(), turn[..., :4].double())[:, None]
        turned = torch.cat([turned.real, turned.imag], -1)
        q, k = turned[..., :repeats, :].flatten(2, 3), turned[..., repeats, :]
        return torch.cat([q, k, heads[..., -1, :]], 2)

    agree(ours, (draw(0, 6, 2, groups, (repeats + 2) * 8, dtype=dtype),), reference, dtype)


def test_rotary_refuses_other_angles() -> None:
    turn, mixed = angles(6, 8), draw(0, 6, 2, 1, 24)
    for q, k in ((turn[..., :4], turn[..., :4]), (turn, turn.clone())):
        with pytest.raises(ValueError, match="fused_single_qkv_rope"):
            split_and_rotate(mixed, q, k, [8, 8, 8])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of the few rows that the tests have, the last one shorter."""
    monkeypatch.setattr(swiglu, "BLOCK_ELEMENTS", 32)


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / (1 + (-gate).exp()) * up


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.usefixtures("small_blocks")
def test_swiglu(rows: int, dtype: torch.dtype) -> None:
    x = draw(0, rows, 2, 12, dtype=dtype)
    agree(lambda x: swiglu.bias_swiglu(x, None, False), (x,), plain_swiglu, dtype)


@pytest.mark.usefixtures("small_blocks")
def test_swiglu_gradients_by_differences() -> None:
    (x,) = exact(draw(0, 13, 12))
    assert gradcheck(swiglu.swiglu, (x,))


class OneRank:
    """A tensor-parallel group of one."""

    def size(self) -> int:
        return 1


@dtypes
@pytest.mark.usefixtures("small_blocks")
def test_cross_entropy(dtype: torch.dtype) -> None:
    target = torch.tensor([[0, 3, 10], [9, 3, 5]])

    def reference(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        ).view_as(target)

    def ours(logits: Tensor) -> Tensor:
        return cross_entropy(logits, target, OneRank())  # type: ignore[arg-type]

    logits = (draw(0, 2, 3, 11, dtype=dtype) * 20).detach().requires_grad_()  # some p underflow
    agree(ours, (logits,), reference, dtype)
    logits = draw(0, 2, 3, 11, dtype=dtype)  # the others are spent
    masked = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    loss = (ours(logits) * masked).sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad[masked == 0].eq(0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


ROUTES = {
    "top-2": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]),
    "all": torch.ones(5, 4),
    "dropped": torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
    "one expert": torch.tensor([[0, 1, 0, 0]] * 5),
    "none": torch.zeros(5, 4),
}


@dtypes
@pytest.mark.parametrize("routes", ROUTES)
def test_dispatch_as_megatrons_own(routes: str, dtype: torch.dtype) -> None:
    routing_map = ROUTES[routes].bool()
    gates = (draw(1, 5, 4).detach() * routing_map).requires_grad_()
    tokens = draw(0, 5, 6, dtype=dtype)
    results, lengths = [], set()
    for module in (dispatch, moe_utils):
        count = int(routing_map.sum())
        moved = module.permute(tokens, routing_map, probs=gates, num_out_tokens=count)
        rows, probs, order = moved[:3]
        lengths.add(len(moved))
        weighed = rows * (1 + probs.unsqueeze(-1)).to(dtype)
        out = module.unpermute(weighed, order, tokens.shape, routing_map=routing_map)
        pull = draw(2, 5, 6, dtype=dtype).detach()
        results.append((rows, probs, order, out, *torch.autograd.grad(out, (tokens, gates), pull)))
    assert len(lengths) == 1
    for name, mine, theirs in zip(["rows", "probs", "order"], *results, strict=False):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(results[0][3:], results[1][3:], strict=True):
        torch.testing.assert_close(mine, theirs, **TOLERANCE[dtype])


def test_chunks_as_megatrons_own() -> None:
    rows, probs, sizes = draw(0, 10, 3), draw(1, 10), torch.tensor([3, 0, 5, 2])
    for order in (torch.tensor([2, 0, 3, 1]), torch.arange(4)):
        mine = dispatch.sort_chunks_by_idxs(rows, sizes, order, probs=probs)
        theirs = moe_utils.sort_chunks_by_idxs(rows, sizes, order, probs=probs)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@dtypes
@pytest.mark.parametrize("counts", [(3, 4, 2), (0, 9, 0), (70, 0, 64), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("in_tiles", [False, True], ids=["as they come", "in tiles"])
@pytest.mark.usefixtures("small_blocks")
def test_feed_forward(
    counts: tuple[int, ...],
    dtype: torch.dtype,
    fuse: bool,
    in_tiles: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_tuning, "onednn_multiplies", lambda _dtype: in_tiles)
    x = draw(0, sum(counts), 8, dtype=dtype)
    weights = [draw(1, 3, 32, 8, dtype=dtype), draw(2, 3, 8, 16, dtype=dtype)]
    x64, *weights64 = exact(x, *weights)
    expected = torch.cat(
        [
            plain_swiglu(rows @ fc1.t()) @ fc2.t()
            for rows, fc1, fc2 in zip(x64.split(counts), *weights64, strict=True)
        ]
    )
    pull = draw(3, 8, sum(counts), dtype=dtype).detach().t()  # as strided as autograd's can be
    right = torch.autograd.grad(expected, (x64, *weights64), pull.double())

    for weight in weights if fuse else ():  # gradients are added to Megatron's buffer, in fp32
        weight.main_grad = torch.ones(weight.shape)
        weight.grad_added_to_main_grad = False
    out = feed_forward(x, torch.tensor(counts), *weights, fuse)
    grad_x, *grads = torch.autograd.grad(out, (x, *weights), pull)
    if fuse:
        assert all(weight.grad_added_to_main_grad for weight in weights)
        grads = [weight.main_grad - 1 for weight in weights]
    for found, wanted in zip((out, grad_x, *grads), (expected, *right), strict=True):
        scale = float(wanted.abs().amax()) or 1.0 if wanted.numel() else 1.0
        torch.testing.assert_close(found.double() / scale, wanted / scale, **TOLERANCE[dtype])


def test_frozen_experts_have_no_gradient() -> None:
    x, weights = draw(0, 4, 8), [draw(1, 2, 32, 8).detach(), draw(2, 2, 8, 16).detach()]
    feed_forward(x, torch.tensor([1, 3]), *weights, False).sum().backward()
    assert x.grad is not None
    assert all(weight.grad is None for weight in weights)


@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
def test_adam_is_torchs_and_resumes(decoupled: bool) -> None:
    settings = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    mine, theirs = (
        [torch.nn.Parameter(draw(0, 5, 3).detach()), torch.nn.Parameter(draw(1, 4).detach())]
        for _ in range(2)
    )
    ours = Adam([{"params": mine}], **settings, adam_w_mode=decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind(theirs, **settings, fused=True)
    for step in range(6):
        if step == 3:  # resumed in the middle
            saved = ours.state_dict()
            ours = Adam([{"params": mine}], lr=1.0, adam_w_mode=decoupled)
            ours.load_state_dict(saved)
        for optimizer in (ours, reference):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            a.grad = draw(10 * step + index, *a.shape).detach()
            b.grad = a.grad.clone()
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    assert ours.param_groups[0]["step"] == 6
    for param in mine:  # the form in which Megatron's distributed optimizer saves and reshards it
        assert set(ours.state[param]) == {"exp_avg", "exp_avg_sq"}


def test_adam_by_hand() -> None:
    param = torch.nn.Parameter(draw(0, 7).detach())
    expected = param.detach().double()
    m = v = torch.zeros(7, dtype=torch.float64)
    adam = Adam([param], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.5)
    for step in range(1, 4):
        param.grad = draw(step, 7).detach()
        adam.step()
        grad = param.grad.double()
        m, v = 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad.square()
        expected = expected * (1 - 0.1 * 0.5)
        root = (v / (1 - 0.99**step)).sqrt()
        expected = expected - 0.1 * (m / (1 - 0.9**step)) / (root + 1e-3)
    torch.testing.assert_close(param.detach().double(), expected, rtol=1e-6, atol=1e-6)
