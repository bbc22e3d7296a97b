"""How Sample Top-1 takes its expert at inference: every evaluation of it names which. Imports no
torch."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_btx.recipe.schema import Routing

_WORDS = {"drawn": "drawn with seeded noise", "argmax": "the argmax of its logits"}


def expert_choice(routing: Routing | None) -> str | None:
    """``drawn`` or ``argmax``; ``None`` of a model that does not sample its experts."""
    if routing is None or routing.type != "sample_top1":
        return None
    return "argmax" if routing.greedy else "drawn"


def expert_choices(routings: Iterable[Routing | None]) -> str | None:
    """Of the models of a set: ``drawn``, ``argmax``, or both joined by «and»."""
    found = {choice for one in routings if (choice := expert_choice(one)) is not None}
    return " and ".join(sorted(found)) or None


def in_words(choice: str) -> str:
    """For people."""
    words = " and ".join(_WORDS[one] for one in choice.split(" and "))
    return f"one expert a token, {words}"
