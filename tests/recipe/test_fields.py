"""Ranges stand beside their fields: every number has one, and both its ends are held."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_btx.errors import UserError
from megatron_btx.evaluate.model_spec import _Set
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.fields import Range, field_docs, out_of_range
from megatron_btx.recipe.messages import options, yaml_name
from megatron_btx.recipe.schema import Mix, Model, Recipe, Slurm, SlurmJob, Training
from megatron_btx.recipe.typed import Reader
from megatron_btx.recipe.yaml_tree import tree_of

BY_NAME = {"data", "average", "average_groups"}
"""Weights by name, which check_mix.weights looks at: their sum counts too."""


def blocks(cls: Any) -> Iterator[Any]:
    """A dataclass and all those under it."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for option in options(hint):
            inner = typing.get_args(option)[1] if typing.get_origin(option) is dict else option
            if dataclasses.is_dataclass(inner):
                yield from blocks(inner)


def holds_numbers(hint: Any) -> bool:
    """Whether a type admits a number, by itself, in a tuple or in a mapping."""
    for option in options(hint):
        origin = typing.get_origin(option)
        if origin in (tuple, dict) and holds_numbers(typing.get_args(option)[origin is dict]):
            return True
        if option in (int, float):
            return True
    return False


ROOTS = (Recipe, MixRequest, _Set)
FIELDS = {
    (cls, field.name): (field, typing.get_type_hints(cls)[field.name])
    for root in ROOTS
    for cls in blocks(root)
    for field in dataclasses.fields(cls)
}
NUMBERS = {key: one for key, one in FIELDS.items() if holds_numbers(one[1])}
RANGED = [key for key, (field, _) in NUMBERS.items() if "range" in field.metadata]


def test_every_number_has_a_range() -> None:
    assert len(NUMBERS) > 60
    without = [
        f"{cls.__name__}.{name}"
        for (cls, name), (field, _) in NUMBERS.items()
        if name not in BY_NAME and not isinstance(field.metadata.get("range"), Range)
    ]
    assert not without, "give the range beside the field (recipe/fields.within)"


def test_a_default_is_in_its_range() -> None:
    for (cls, name), (field, _) in NUMBERS.items():
        limits = field.metadata.get("range")
        if limits is not None and isinstance(field.default, (int, float)):
            assert limits.problem(field.default) is None, (cls, name)


@pytest.mark.parametrize("key", RANGED, ids=lambda key: f"{key[0].__name__}.{key[1]}")
def test_both_ends_are_held(key: tuple[type, str]) -> None:
    """The reader takes the ends and refuses what is beyond either, NaN, infinity and booleans."""
    cls, name = key
    field, hint = NUMBERS[key]
    limits = field.metadata["range"]
    low, high = limits.low, limits.high
    whole = int in options(hint) or typing.get_origin(options(hint)[0]) is tuple
    beyond = (low - 1, high + 1) if whole else (low - abs(low) * 1e-9 - 1e-30, high * (1 + 1e-9))
    for value in (low, high):
        assert told(cls, name, value) == [], value
    for value in (*beyond, math.nan, math.inf, True, "x", {}):
        (error,) = told(cls, name, value)
        assert yaml_name(name) in error
        assert "fix: " in error


def told(cls: Any, name: str, value: Any) -> list[str]:
    """The errors about one field of a block."""
    if typing.get_origin(options(typing.get_type_hints(cls)[name])[0]) is dict:
        value = {"a": value}
    reader = Reader()
    reader.instance(cls, [tree_of({yaml_name(name): value}, None)], "")
    return [str(error) for _, error in reader.errors if "is missing" not in str(error)]


def test_a_block_made_by_hand_is_checked_too() -> None:
    assert list(out_of_range(Mix(copies=0, dare=2.0))) == [
        ("copies", "is 0, out of range", "give at least 1"),
        ("dare", "is 2.0, out of range", "give 0 to 0.999"),
    ]
    assert not list(out_of_range(Training()))


def test_text_under_a_field() -> None:
    assert field_docs(Model)["kv_channels"].startswith("Head dimension")
    assert field_docs(Training)["lr"] == "Peak learning rate."
    both = field_docs(Slurm)
    assert {"launch_prefix", "time"} <= both.keys()
    assert "launch_prefix" not in field_docs(SlurmJob)


def test_a_former_name(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_btx.recipe.fields import renamed

    @dataclasses.dataclass
    class Block:
        method: str = renamed("a", "select")

    globals()["Block"] = Block
    reader = Reader()
    tree = tree_of({"select": "b"}, None, "block")
    assert reader.instance(Block, [tree], "block").method == "b"
    assert capsys.readouterr().err == (
        "hint: block.select is called `method` now; this release reads both names\n"
    )
    reader.instance(Block, [tree_of({"select": "b", "method": "c"}, None, "block")], "block")
    with pytest.raises(UserError, match=r"block\.select: is the former name of `method`"):
        reader.raise_errors()
