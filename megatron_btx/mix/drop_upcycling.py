"""Drop-Upcycling's partial re-initialisation (arXiv 2502.19261, section 3): copies that differ.

For each expert a share r of the inner units is chosen; their rows of the gate and up matrices and
their columns of the down matrix are drawn anew, from a normal of that matrix's mean and standard
deviation. The same units in all three, as the paper's text has it (its released script chooses for
each matrix on its own, so that at r = 0.5 an eighth of the units stays whole).
"""

from __future__ import annotations

import torch

from megatron_btx.weights.arithmetic import Product, WeightedSum
from megatron_btx.weights.arrange import Cat, Take
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import reshape, rows
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.random_fill import Draw, Fill
from megatron_btx.weights.statistics import Statistics, moments

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
