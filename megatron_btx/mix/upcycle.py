"""Sparse upcycling (arXiv 2212.05055): every expert begins as the FFN of one dense model.

BTX "generalizes" it (the abstract): it is the mix of a model with itself, before any expert has
been trained. Granular upcycling cuts each FFN into G chunks first (arXiv 2410.07524); noise and
Drop-Upcycling make the copies differ.

Drop-Upcycling is a partial re-initialisation (arXiv 2502.19261, section 3): for each expert a share
r of the inner units is chosen; their rows of the gate and up matrices and their columns of the down
matrix are drawn anew, from a normal of that matrix's mean and standard deviation. The same units in
all three, as the paper's text has it (its released script chooses for each matrix on its own, so
that at r = 0.5 an eighth of the units stays whole).
"""

from __future__ import annotations

from typing import Literal

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.compatibility import disagreements
from megatron_btx.mix.parts import chunk, moe_targets
from megatron_btx.mix.router_init import NORMAL, RouterInit
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.weights.arithmetic import Product, WeightedSum
from megatron_btx.weights.arrange import Cat, Reshape, Take
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import reshape, rows
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.random_fill import Draw, Fill
from megatron_btx.weights.source import Source
from megatron_btx.weights.statistics import Statistics, moments


def upcycle(
    model: Checkpoint,
    *,
    copies: int,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = NORMAL,
    noise: float = 0.0,
    drop_ratio: float = 0.0,
    num_chunks: int = 1,
    scale: Literal["down", "cube_root", "none"] = "down",
) -> Plan:
    """The plan of an MoE of ``copies * num_chunks`` experts: number ``c * num_chunks + g`` is chunk
    ``g`` of copy ``c``.

    The router of a granular MoE is one row per copy, repeated for its chunks (a virtual group), so
    that a top-k of a multiple of ``num_chunks`` takes whole copies.

    Args:
        model: the dense model.
        copies: of its FFN.
        routing: how the MoE will route.
        dtype: of the result.
        router: how the rows of the router are drawn.
        noise: standard deviation of normal noise added to each expert, from ``router.seed``.
        drop_ratio: share of each expert's inner units that are drawn anew (mix/upcycle.py),
            before any scaling and noise; seeded by ``router.seed``.
        num_chunks: G, of which each has ``ffn_hidden_size / G`` inner units.
        scale: makes up for gates that sum to one over chunks that should be summed. ``down``: the
            whole factor G on the down matrix, which is exact: step 0 equals the dense model.
            ``cube_root``: ``(E G^2 / k) ** (1/3)`` on every matrix, the rule of arXiv 2410.07524,
            exact for squared ReLU and softmax before top-k only. ``none``: nothing.

    Raises:
        UserErrors: the model is an MoE, or its FFN cannot be cut so.
    """
    errors = disagreements([model])
    ffn_size = model.architecture.model.ffn_hidden_size
    if ffn_size % num_chunks:
        what = f"an FFN of {ffn_size} does not divide into {num_chunks} chunks"
        errors.append(UserError("mix.num_chunks", what, "choose a divisor"))
    if errors:
        raise UserErrors(errors)
    mix = Mix(method="upcycle", copies=copies, num_chunks=num_chunks)
    architecture = model.architecture.mixture([model.label], mix, routing)
    experts = architecture.experts
    tensors = model.tensors
    sources: dict[str, Source] = {model.label: model.source}
    moments = f"moments of {model.label}"
    if drop_ratio:
        sources[moments] = moments_of(model)

    def ffn(name: str, expert: int) -> Expression:
        own = tensors[name]
        if num_chunks > 1:
            own = chunk(name, own, expert % num_chunks, num_chunks)
        parts: tuple[Expression, ...] = (own,)
        if drop_ratio:
            parts = redrawn(
                name,
                own,
                ratio=drop_ratio,
                moments=moments,
                seed=router.seed,
                expert=experts[expert],
            )
        factor = 1.0
        if num_chunks > 1 and scale == "cube_root":
            factor = (copies * num_chunks**2 / routing.moe_router_topk) ** (1 / 3)
        elif num_chunks > 1 and scale == "down" and name.endswith("linear_fc2.weight"):
            factor = float(num_chunks)
        weights = (factor,) * len(parts)
        if noise:
            label = f"{experts[expert]}/{name}"
            parts += (Draw("normal", noise, router.seed, label, own.shape, torch.float64),)
            weights += (1.0,)
        return own.to(dtype) if weights == (1.0,) else WeightedSum(parts, weights, 1.0, dtype)

    def grouped(name: str, shape: Shape) -> Expression:
        each = router.draw(name, (copies, shape[1]), dtype)
        return each if num_chunks == 1 else reshape(_repeated(each, num_chunks), shape)

    return Plan(
        architecture=architecture,
        targets=moe_targets(
            architecture, ffn=ffn, router=grouped, rest=lambda name: tensors[name].to(dtype)
        ),
        sources=sources,
        expected=canonical_tensors(architecture),
    )


def _repeated(each: Expression, times: int) -> Expression:
    """``[n, h]`` -> ``[n, times, h]``."""
    column = Reshape(each, (each.shape[0], 1, each.shape[1]))
    return Cat((column,) * times, 1)


_F64 = torch.float64
_DOWN = "linear_fc2.weight"


def moments_of(model: Checkpoint) -> Statistics:
    """Mean and standard deviation of every gate, up and down matrix of a dense model."""
    parts: dict[str, Expression] = {}
    for name, whole in model.tensors.items():
        if name.endswith(_DOWN):
            parts[name] = whole
        elif name.endswith("linear_fc1.weight"):
            ffn = whole.shape[0] // 2
            parts[f"{name}/gate"] = rows(whole, 0, ffn)
            parts[f"{name}/up"] = rows(whole, ffn, 2 * ffn)
    return moments({model.label: model.source}, parts)


def redrawn(
    name: str, own: Expression, *, ratio: float, moments: str, seed: int, expert: str
) -> tuple[Expression, ...]:
    """What an expert's matrix is the sum of: its old units, and the new ones' spread and centre.

    Args:
        name: of the matrix in the dense model: fc1 [2 F, H] or fc2 [H, F].
        own: it, or a chunk of it.
        ratio: r; exactly ``round(r F)`` units are drawn anew.
        moments: label of the source that :func:`moments_of` made.
        seed: of the choice and of the draws.
        expert: its name, which both depend on too.
    """
    layer, _, kind = name.rpartition(".mlp.")
    is_down = kind == _DOWN
    units = own.shape[1] if is_down else own.shape[0] // 2
    chosen: Expression = Draw("subset", ratio, seed, f"{expert}/{layer}/units", (units,), _F64)
    ones: Expression = Fill(1.0, own.shape, _F64)
    scalars = {
        part: Take(moments, f"{name}/{part}", (), torch.float32)
        for part in (("mean", "std") if is_down else ("gate/mean", "gate/std", "up/mean", "up/std"))
    }

    def of_rows(kind: str) -> Expression:
        """One value a row: the gate's, then the up matrix's."""
        column = Fill(1.0, (units, 1), _F64)
        halves = [Product((column, scalars[f"{half}/{kind}"]), (), _F64) for half in ("gate", "up")]
        return Cat(tuple(halves), 0)

    centre, spread = (
        (scalars["mean"], scalars["std"]) if is_down else (of_rows("mean"), of_rows("std"))
    )
    if not is_down:
        chosen = reshape(Cat((chosen, chosen), 0), (2 * units, 1))
    kept = WeightedSum((Fill(1.0, chosen.shape, _F64), chosen), (1.0, -1.0), 1.0, _F64)
    draw = Draw("normal", 1.0, seed, f"{expert}/{name}/new", own.shape, _F64)
    return (
        Product((own, kept), (), _F64),
        Product((draw, spread, chosen), (), _F64),
        Product((ones, centre, chosen), (), _F64),
    )
