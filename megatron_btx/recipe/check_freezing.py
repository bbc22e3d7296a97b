"""What ``freeze``, ``freeze_until`` and ``lr_groups`` of a stage must fulfil."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_btx.recipe import count, freezing
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.messages import near_key, show
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Model, Training


def problems(
    key: str, stage: Training, architecture: Architecture, model: Model
) -> Iterator[Problem]:
    """Everything wrong with them, by dotted key.

    Args:
        key: of the stage.
        stage: its settings, with its tokens.
        architecture: what it trains.
        model: the recipe's.
    """
    if stage.from_ is not None:
        return
    for field in ("freeze", "lr_groups"):
        for word in getattr(stage, field):
            if not freezing.named(architecture, word):
                what = f"{show(word)} names no tensor of {_model(architecture)}"
                yield Problem(f"{key}.{field}", what, _fix(architecture, word))
    still, _ = freezing.before_and_after(architecture, stage)
    if still and still == canonical_tensors(architecture).keys():
        what = "names every tensor: nothing would learn"
        yield Problem(f"{key}.freeze", what, "leave something out; to train nothing give tokens: 0")
    yield from _until(key, stage, model)
    for word in stage.lr_groups if stage.freeze_until is None else ():
        if (own := freezing.named(architecture, word)) and own <= still:
            what = f"gives {word} a rate, and it is frozen throughout"
            yield Problem(f"{key}.lr_groups", what, "remove one of the two")


def _until(key: str, stage: Training, model: Model) -> Iterator[Problem]:
    thawed, steps = freezing.thaws_at(stage, model), count.steps(stage, model)
    if thawed is None:
        return
    if not stage.freeze:
        what = "says until when nothing is frozen"
        yield Problem(f"{key}.freeze_until", what, "add `freeze: [...]`, or remove it")
    elif steps and thawed >= steps:
        what = f"is not before the stage's end: {thawed} of {steps} steps"
        yield Problem(f"{key}.freeze_until", what, "lower it; to freeze throughout remove it")


def _model(architecture: Architecture) -> str:
    if not architecture.experts:
        return "a dense model"
    return f"an MoE of {', '.join(architecture.experts)}"


def _fix(architecture: Architecture, word: str) -> str:
    experts = [f"experts.{name}" for name in architecture.experts]
    known = [word for word in freezing.WORDS if freezing.named(architecture, word)]
    if word == "experts" or (word.startswith("experts.") and not experts):
        return "the feed-forward layers of a dense model are `ffn`"
    if word == "ffn":
        return "the feed-forward layers of an MoE are `experts`"
    return (
        f"use {', '.join([*known, *experts])}, or a pattern such as decoder.layers.0.*"
        + near_key(word, [*known, *experts])
    )
