"""How routers are initialised."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_btx.errors import UserError, shown
from megatron_btx.recipe.check_mix import FROM_FILE
from megatron_btx.recipe.names import ROUTER
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import mean, stack
from megatron_btx.weights.random_fill import Draw, Fill
from megatron_btx.weights.source import Source

CENTROIDS = "mix/centroids"
"""Label of their source in a plan: with a ``/``, as no model's name has one."""
OWN, ANCHOR = "own", "anchor"
"""The rows of an anchored branch's router: ``NAME/own``, ``NAME/anchor`` (mix/anchored.py)."""


@dataclass(frozen=True)
class RouterInit:
    """How the routers W_l begin. The paper does not say; its upcycling baseline is random."""

    kind: Literal["normal", "zeros", "uniform", "centroids", "ridge", "branches"] = "normal"
    scale: float = 0.02
    """Standard deviation, or half the width of the uniform interval."""
    seed: int = 0
    centroids: Source | None = None
    """The file of ``btx centroids``: a row ``NAME/EXPERT`` of every router ``NAME``."""
    seed_model: str = "seed"
    """Of ``branches``: the expert that anchors the others."""

    def draw(self, name: str, shape: Shape, dtype: torch.dtype) -> Expression:
        """The router ``name``: a function of seed and name alone."""
        if self.kind == "centroids" or self.kind == "ridge" or self.kind == "branches":
            raise UserError("mix.router_init", f"{self.kind} is for method btx", "choose another")
        if self.kind == "zeros":
            return Fill(0.0, shape, dtype)
        return Draw(self.kind, self.scale, self.seed, name, shape, dtype)

    def of_experts(
        self, name: str, shape: Shape, dtype: torch.dtype, experts: Sequence[str]
    ) -> Expression:
        """Router ``name`` with a row per expert: drawn, from a file, or from the experts' branches
        (the row of the seed is then the mean of their anchors' rows)."""
        if self.kind == "branches":
            own = [expert for expert in experts if expert != self.seed_model]

            def row(expert: str, which: str) -> Expression:
                return Take(expert, f"{name}/{which}", shape[1:], dtype)

            shared = mean([row(expert, ANCHOR) for expert in own], dtype)
            return stack([row(one, OWN) if one in own else shared for one in experts])
        if self.kind not in FROM_FILE:
            return self.draw(name, shape, dtype)
        rows = [Take(CENTROIDS, f"{name}/{expert}", shape[1:], torch.float32) for expert in experts]
        return stack([row.to(dtype) for row in rows])

    @property
    def sources(self) -> dict[str, Source]:
        """What a plan with these routers reads besides its models."""
        return {} if self.centroids is None else {CENTROIDS: self.centroids}


def check_rows(rows: Source, where: str, experts: Sequence[str], model: Model) -> None:
    """That a file of ``btx centroids`` has a row of every expert in every layer, and no other.

    Args:
        rows: the file, opened.
        where: its path.
        experts: of the mixture.
        model: what the mixture is of.

    Raises:
        UserError: it is another file, or one of other experts or of a model of another shape.
    """
    fix = "give the file that `btx centroids` wrote of a mixture of these models"
    found = {re.fullmatch(_ROW, name): shape for name, (shape, _) in rows.tensors.items()}
    if None in found or not found:
        raise UserError(where, "holds no router rows: `btx centroids` did not write it", fix)
    matches = [match for match in found if match is not None]
    named = sorted({match["expert"] for match in matches})
    if set(named) != set(experts):
        what = f"holds router rows of the experts {shown(', '.join(named))}"
        raise UserError(where, f"{what}, and those mixed are {', '.join(experts)}", fix)
    layers, shapes = model.num_layers, set(found.values())
    each = {(int(match["layer"]), match["expert"]) for match in matches}
    if each != {(layer, expert) for layer in range(layers) for expert in experts}:
        layer_count = len({layer for layer, _ in each})
        what = f"holds router rows of {layer_count} layers, and the model has {layers}"
        if layer_count == layers:
            what = "lacks the router rows of some layers"
        raise UserError(where, what, fix)
    if shapes != {(model.hidden_size,)}:
        what = f"holds router rows of shape {shown(sorted(shapes))}"
        raise UserError(where, f"{what}, and hidden_size is {model.hidden_size}", fix)


_ROW = rf"decoder\.layers\.(?P<layer>\d{{1,6}})\.{re.escape(ROUTER)}/(?P<expert>[^/]+)"

NORMAL = RouterInit()
"""Normal with Megatron's ``init_method_std``."""
