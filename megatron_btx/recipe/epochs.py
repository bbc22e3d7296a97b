"""What a run reads: the tokens of every domain in every stage, and how often it is gone through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.files import find_json
from megatron_btx.recipe import count, stages
from megatron_btx.recipe.messages import aligned
from megatron_btx.recipe.schema import Recipe

MANY = 4.0
"""Up to four epochs, repeated text is nearly worth new text (arXiv 2305.16264)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one stage reads of one domain."""

    stage: str
    domain: str
    tokens: int
    epochs: float | None
    """How often the domain's training text is gone through; ``None`` before it is prepared. Of
    several token files with weights, that which is read the most often."""


def prepared(recipe: Recipe) -> dict[str, Any] | None:
    """What the prepare stage found in every domain; ``None`` if it is not done, or was done for
    other domains."""
    summary = find_json(Path(recipe.run_dir) / "prepare" / "data.json")
    domains = (summary or {}).get("domains")
    return domains if isinstance(domains, dict) and set(domains) >= set(recipe.domains) else None


def reading(
    recipe: Recipe, trained: Iterable[str], domains: Mapping[str, Any] | None
) -> tuple[Reading, ...]:
    """Every stage's domains, in the order of both.

    Args:
        recipe: the run.
        trained: names of the stages.
        domains: what :func:`prepared` gives.
    """
    found = []
    for stage in trained:
        tokens: dict[str, float] = {}
        for part in (part for group in stages.reads(recipe, stage) for part in group):
            whole = count.trained_tokens(part.block, recipe.model)
            for domain, share in count.mixture(part.block.data).items():
                tokens[domain] = tokens.get(domain, 0) + share * whole
        found += [
            Reading(
                stage=stage,
                domain=domain,
                tokens=round(number),
                epochs=_epochs(number, (domains or {}).get(domain)),
            )
            for domain, number in tokens.items()
        ]
    return tuple(found)


def _epochs(tokens: float, domain: Mapping[str, Any] | None) -> float | None:
    if domain is None:
        return None
    train = domain["train"]
    parts = train.get("blend") or [[train["tokens"], 1.0]]
    return max(tokens * share / max(there, 1) for there, share in parts)


def warnings(readings: Iterable[Reading]) -> list[str]:
    """A warning for each domain that a stage goes through too often."""
    return [
        f"{one.stage} goes through domain {one.domain} {one.epochs:.1f} times: give it more text, "
        "a smaller weight, or train on fewer tokens"
        for one in readings
        if one.epochs is not None and one.epochs > MANY
    ]


def render(readings: Iterable[Reading], domains: Mapping[str, Any] | None) -> str:
    """Both as plain text."""
    rows = [("stage", "domain", "tokens", "epochs")]
    rows += [
        (one.stage, one.domain, f"{one.tokens:,}", _number(one.epochs, ".2f")) for one in readings
    ]
    text = ["What is read", "", *_ruled(rows, left=2)]
    if domains is None:
        return "\n".join([*text, "", "Epochs are known when stage prepare is done."])
    table = [("domain", "documents", "tokens", "bytes", "held-out documents", "tokens", "bytes")]
    for name, splits in domains.items():
        cells = [
            _number(splits[split].get(what))
            for split in ("train", "valid")
            for what in ("documents", "tokens", "bytes")
        ]
        table.append((name, *cells))  # type: ignore[arg-type]
    return "\n".join([*text, "", "What there is", "", *_ruled(table, left=1)])


def _number(value: float | None, form: str = ",") -> str:
    return "-" if value is None else format(value, form)


def _ruled(rows: list[Any], left: int) -> list[str]:
    lines = aligned(rows, left)
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]
