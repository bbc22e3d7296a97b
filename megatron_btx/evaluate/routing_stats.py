"""How evenly an MoE's experts are used, under the names in use (NeMo Automodel's). No torch.

Of the shares p of a layer's N experts, on one text: utilisation is N p (1 is even), cv their
standard deviation over their mean, diversity exp(H(p)) / N (1 is even, 1/N is one expert), and an
expert is dead whose share is below ``DEAD``. And how Sample Top-1 takes its expert at inference,
which every evaluation of it names.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from megatron_btx.recipe.schema import Routing

DEAD = 0.01
"""An expert that gets less than this share of the choices is called dead."""

Matrix = Sequence[Sequence[float]]
"""``[layer][expert]``, rows sum to 1."""


def of_layer(shares: Sequence[float]) -> dict[str, float]:
    """Of one layer on one text."""
    count, total = len(shares), sum(shares)
    if not total:
        return {}
    use = sorted(count * share / total for share in shares)
    entropy = -sum(u / count * math.log(u / count) for u in use if u)
    return {
        "expert_utilization_min": use[0],
        "expert_utilization_p25": percentile(use, 0.25),
        "expert_utilization_median": percentile(use, 0.5),
        "expert_utilization_p75": percentile(use, 0.75),
        "expert_utilization_max": use[-1],
        "cv": statistics.pstdev(use),
        "expert_diversity": math.exp(entropy) / count,
        "dead_expert_frac": sum(u < DEAD * count for u in use) / count,
    }


def of_load(load: Mapping[str, Matrix]) -> dict[str, float]:
    """Means over texts and layers: ``moe/cv_mean``, ``moe/expert_utilization_p25``, ..."""
    layers = [found for matrix in load.values() for row in matrix if (found := of_layer(row))]
    if not layers:
        return {}
    means = {name: statistics.fmean(each[name] for each in layers) for name in layers[0]}
    return {
        f"moe/{name}" if "utilization" in name else f"moe/{name}_mean": value
        for name, value in means.items()
    }


def by_layer(load: Mapping[str, Matrix]) -> dict[str, list[dict[str, float]]]:
    """Of every text and layer."""
    return {name: [of_layer(row) for row in matrix] for name, matrix in load.items()}


def percentile(ordered: Sequence[float], share: float) -> float:
    """By linear interpolation, as NumPy's default, of values in ascending order."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


CHOICES = {"drawn": "drawn with seeded noise", "argmax": "the argmax of its logits"}


def expert_choice(routing: Routing | None) -> str | None:
    """``drawn`` or ``argmax``; ``None`` of a model that does not sample its experts."""
    if routing is None or routing.type != "sample_top1":
        return None
    return "argmax" if routing.greedy else "drawn"


def expert_choices(routings: Iterable[Routing | None]) -> str | None:
    """Of the models of a set: ``drawn``, ``argmax``, or both joined by «and»."""
    found = {choice for one in routings if (choice := expert_choice(one)) is not None}
    return " and ".join(sorted(found)) or None


def choice_in_words(choice: str) -> str:
    """For people."""
    words = " and ".join(CHOICES[one] for one in choice.split(" and "))
    return f"one expert a token, {words}"
