"""Branch-Train-MiX itself (arXiv 2403.07816, section 3.2): N dense models become one MoE.

At every layer the models' feed-forward sublayers become the experts of one MoE sublayer, all other
parameters are averaged, and one linear router per layer is born.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.mix.agreement import disagreements
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.expression import Draw, Expression, Fill, mean
from megatron_btx.weights.names import DENSE_NORM, MOE_NORM, ROUTER, canonical_tensors
from megatron_btx.weights.plan import Checkpoint, Plan


@dataclass(frozen=True)
class RouterInit:
    """How the routers W_l are born. The paper does not say; its upcycling baseline is random."""

    kind: Literal["normal", "zeros", "uniform"] = "normal"
    scale: float = 0.02
    """Standard deviation, or half the width of the uniform interval."""
    seed: int = 0

    def draw(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Expression:
        """The router ``name``: a function of seed and name alone."""
        if self.kind == "zeros":
            return Fill(0.0, shape, dtype)
        return Draw(self.kind, self.scale, self.seed, name, shape, dtype)


def btx(
    models: Sequence[Checkpoint],
    *,
    routing: Routing,
    dtype: torch.dtype,
    router: RouterInit = RouterInit(),
    average: Mapping[str, float] | None = None,
) -> Plan:
    """The plan of the MoE whose expert i is the FFN of model i.

    Args:
        models: dense models of one shape and tokenizer, in the order of the experts.
        routing: how the MoE will route; kept with its architecture.
        dtype: of the result; averages are rounded to it once, from fp64.
        router: how the router of each layer is drawn.
        average: weights of the average by model label, normalised here; ``None``: uniform, as in
            the paper.

    Raises:
        UserErrors: everything in which the models differ but must not.
    """
    errors = disagreements(models)
    labels = [model.label for model in models]
    if average is not None and set(average) != set(labels):
        what = f"averages {', '.join(average)}, mixes {', '.join(labels)}"
        errors.append(UserError("mix.average", what, "give each model of the mix one weight"))
    if errors:
        raise UserErrors(errors)
    weights = None if average is None else [average[label] for label in labels]

    dense = models[0].architecture
    architecture = replace(dense, experts=tuple(labels), routing=routing)
    sources = [model.tensors for model in models]
    expected = canonical_tensors(architecture)
    targets: dict[str, Expression] = {}
    for name, shape in expected.items():
        layer, _, rest = name.partition(".mlp.experts.")
        if rest:
            expert, _, weight = rest.partition(".")
            targets[name] = sources[int(expert)][f"{layer}.mlp.{weight}"].to(dtype)
        elif name.endswith(ROUTER):
            targets[name] = router.draw(name, shape, dtype)
        else:
            own = name.replace(MOE_NORM, DENSE_NORM)
            targets[name] = mean([source[own] for source in sources], dtype, weights)
    return Plan(
        architecture=architecture,
        targets=targets,
        sources={model.label: model.source for model in models},
        expected=expected,
    )
