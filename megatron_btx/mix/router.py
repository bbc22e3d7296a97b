"""How routers are born."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Draw, Expression, Fill


@dataclass(frozen=True)
class RouterInit:
    """How the routers W_l are born. The paper does not say; its upcycling baseline is random."""

    kind: Literal["normal", "zeros", "uniform"] = "normal"
    scale: float = 0.02
    """Standard deviation, or half the width of the uniform interval."""
    seed: int = 0

    def draw(self, name: str, shape: Shape, dtype: torch.dtype) -> Expression:
        """The router ``name``: a function of seed and name alone."""
        if self.kind == "zeros":
            return Fill(0.0, shape, dtype)
        return Draw(self.kind, self.scale, self.seed, name, shape, dtype)


NORMAL = RouterInit()
"""Normal with Megatron's ``init_method_std``."""
