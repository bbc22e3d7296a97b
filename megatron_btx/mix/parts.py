"""What the mixes share: where each tensor of an MoE comes from, and chunks of FFNs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import DENSE_NORM, MOE_NORM, ROUTER, canonical_tensors
from megatron_btx.weights.arrange import Cat
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import rows

_EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(.*)")


def moe_targets(
    architecture: Architecture,
    *,
    ffn: Callable[[str, int], Expression],
    router: Callable[[str, Shape], Expression],
    rest: Callable[[str], Expression],
) -> dict[str, Expression]:
    """Every tensor of an MoE from three rules.

    Args:
        architecture: the MoE.
        ffn: (name of the tensor in a dense model, expert) -> that expert's.
        router: (name, shape) -> the router's.
        rest: name of the tensor in a dense model -> all others.
    """
    targets = {}
    for name, shape in canonical_tensors(architecture).items():
        if expert := _EXPERT.fullmatch(name):
            targets[name] = ffn(f"{expert[1]}{expert[3]}", int(expert[2]))
        elif name.endswith(ROUTER):
            targets[name] = router(name, shape)
        else:
            targets[name] = rest(name.replace(MOE_NORM, DENSE_NORM))
    return targets


def chunk(name: str, whole: Expression, index: int, count: int) -> Expression:
    """Chunk ``index`` of ``count`` of a feed-forward layer: a range of its inner units, whose rows
    it takes of gate and up (fc1) and whose columns of down (fc2)."""
    if name.endswith("linear_fc2.weight"):
        size = whole.shape[1] // count
        return rows(whole, index * size, (index + 1) * size, 1)
    ffn = whole.shape[0] // 2
    size = ffn // count
    gate = rows(whole, index * size, (index + 1) * size)
    up = rows(whole, ffn + index * size, ffn + (index + 1) * size)
    return Cat((gate, up), 0)


def joined(name: str, chunks: Iterable[Expression]) -> Expression:
    """Chunks side by side: the inverse of :func:`chunk`."""
    parts = tuple(chunks)
    if name.endswith("linear_fc2.weight"):
        return Cat(parts, 1)
    halves = [(part, part.shape[0] // 2) for part in parts]
    gates = [rows(part, 0, half) for part, half in halves]
    ups = [rows(part, half, 2 * half) for part, half in halves]
    return Cat((*gates, *ups), 0)
