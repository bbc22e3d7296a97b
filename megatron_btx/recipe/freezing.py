"""What a training stage freezes, until when, at which rate the rest learns, and what of a
recipe's ``freeze``, ``freeze_until`` and ``lr_groups`` is wrong.

``freeze:`` and ``lr_groups:`` name tensors by groups, by experts, or by patterns of their canonical
names (recipe/names.py), so that they mean the same under every layout.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from megatron_btx.recipe import count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.messages import near_key, show
from megatron_btx.recipe.names import EMBEDDING, HEAD, ROUTER, canonical_tensors, group_of, is_part
from megatron_btx.recipe.schema import Model, Training

WORDS = ("embeddings", "attention", "norms", "ffn", "experts", "router", "head")
"""Groups of tensors. Biases belong to their matrices, the norms over heads to the norms."""


def kind_of(name: str) -> str:
    """The group of a canonical tensor: one of ``WORDS``."""
    if name.endswith(ROUTER):
        return "router"
    return "experts" if ".mlp.experts." in name else group_of(name)


def named(architecture: Architecture, word: str) -> frozenset[str]:
    """The canonical tensors that a word of ``freeze`` names; none: it says nothing here.

    ``head`` is the embedding where the two are tied; ``experts.math`` also names what became of an
    expert's parts or copies (``math.0``, ``math.1``), and no other expert (``math.proofs``).
    """
    names = canonical_tensors(architecture)
    if word == "head" and HEAD not in names:
        return frozenset([EMBEDDING])
    if word in WORDS:
        return frozenset(name for name in names if kind_of(name) == word)
    expert, every = word.removeprefix("experts."), architecture.experts
    # An expert of that very name hides what would be called like parts of it (Llama-3, Llama-3.1).
    parts = [expert] if expert in every else [own for own in every if is_part(own, expert)]
    numbers = [
        number
        for number, own in enumerate(architecture.experts)
        if word.startswith("experts.") and own in parts
    ]
    if numbers:
        ends = tuple(f".mlp.experts.{number}." for number in numbers)
        return frozenset(name for name in names if any(end in name for end in ends))
    return frozenset(fnmatch.filter(names, word))


def frozen(architecture: Architecture, words: Iterable[str]) -> frozenset[str]:
    """All canonical tensors that ``words`` name."""
    return frozenset[str]().union(*(named(architecture, word) for word in words))


def rates(architecture: Architecture, lr_groups: Mapping[str, float]) -> dict[str, float]:
    """The peak learning rate of each canonical tensor that has one of its own."""
    found: dict[str, float] = {}
    for word, rate in lr_groups.items():
        found |= dict.fromkeys(named(architecture, word), rate)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """Steps of a stage in which the same tensors are frozen."""

    first: int
    """Step, from 0."""
    last: int
    """The step behind them."""
    frozen: frozenset[str]
    """Canonical names."""


def phases(architecture: Architecture, stage: Training, model: Model) -> tuple[Phase, ...]:
    """A stage's phases in their order: one, or what comes before and after ``freeze_until``."""
    steps, thawed = count.steps(stage, model), thaws_at(stage, model)
    before, after = before_and_after(architecture, stage)
    if before == after or thawed is None or thawed >= steps:
        return (Phase(first=0, last=steps, frozen=before),)
    return (
        Phase(first=0, last=thawed, frozen=before),
        Phase(first=thawed, last=steps, frozen=after),
    )


def before_and_after(
    architecture: Architecture, stage: Training
) -> tuple[frozenset[str], frozenset[str]]:
    """What is frozen before ``freeze_until`` and after it: an anchor always."""
    anchor = named(architecture, f"experts.{stage.anchor}") if stage.anchor else frozenset()
    return frozen(architecture, stage.freeze) | anchor, anchor


def thaws_at(stage: Training, model: Model) -> int | None:
    """The first step in which everything learns; ``None``: there is none."""
    if stage.freeze_until is None:
        return None
    return math.ceil(stage.freeze_until / (stage.global_batch_size * model.seq_length))


def flops_per_token(architecture: Architecture, still: frozenset[str]) -> int:
    """Of training. A frozen matrix needs no gradient of its own: one product of the backward pass
    is saved, two FLOPs for each weight that a token meets. Gradients of inputs go all the way down.
    """
    return count.training_flops_per_token(architecture) - 2 * sum(_met(architecture, still))


def stage_flops(architecture: Architecture, stage: Training, model: Model) -> int:
    """Training FLOPs of a whole stage."""
    tokens = stage.global_batch_size * model.seq_length
    return sum(
        (phase.last - phase.first) * tokens * flops_per_token(architecture, phase.frozen)
        for phase in phases(architecture, stage, model)
    )


def steps_for(architecture: Architecture, stage: Training, model: Model, flops: int) -> int:
    """Steps of a stage that cost so many FLOPs, to the nearest; at least one."""
    tokens = stage.global_batch_size * model.seq_length
    still, after = before_and_after(architecture, stage)
    each = tokens * flops_per_token(architecture, still)
    thawed = thaws_at(stage, model)
    if thawed is None or flops <= thawed * each:
        return max(1, round(flops / each))
    left = flops - thawed * each
    return thawed + round(left / (tokens * flops_per_token(architecture, after)))


def _met(architecture: Architecture, still: frozenset[str]) -> Iterator[int]:
    """Of each frozen matrix, the weights that one token meets; of experts, on average."""
    model = architecture.model
    shapes = canonical_tensors(architecture)
    head = HEAD if model.untie_embeddings_and_output_weights else EMBEDDING
    if head in still:
        yield architecture.padded_vocab_size * model.hidden_size
    run = count.experts_run(architecture)
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        here = [(name, shapes[name]) for name in still if name.startswith(prefix)]
        sizes = {name: math.prod(shape) for name, shape in here if len(shape) == 2}
        experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        yield sum(sizes.values()) - experts
        yield experts * run[layer] // max(len(architecture.experts), 1)


def problems(
    key: str, stage: Training, architecture: Architecture, model: Model
) -> Iterator[Problem]:
    """Everything wrong with ``freeze``, ``freeze_until`` and ``lr_groups``, by dotted key.

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
            if not named(architecture, word):
                what = f"{show(word)} names no tensor of {_model(architecture)}"
                yield Problem(f"{key}.{field}", what, _fix(architecture, word))
    still, _ = before_and_after(architecture, stage)
    if still and still == canonical_tensors(architecture).keys():
        what = "names every tensor: nothing would learn"
        yield Problem(f"{key}.freeze", what, "leave something out; to train nothing give tokens: 0")
    yield from _until(key, stage, model)
    for word in stage.lr_groups if stage.freeze_until is None else ():
        if (own := named(architecture, word)) and own <= still:
            what = f"gives {word} a rate, and it is frozen throughout"
            yield Problem(f"{key}.lr_groups", what, "remove one of the two")


def _until(key: str, stage: Training, model: Model) -> Iterator[Problem]:
    thawed, steps = thaws_at(stage, model), count.steps(stage, model)
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
    known = [word for word in WORDS if named(architecture, word)]
    if word == "experts" or (word.startswith("experts.") and not experts):
        return "the feed-forward layers of a dense model are `ffn`"
    if word == "ffn":
        return "the feed-forward layers of an MoE are `experts`"
    return (
        f"use {', '.join([*known, *experts])}, or a pattern such as decoder.layers.0.*"
        + near_key(word, [*known, *experts])
    )
