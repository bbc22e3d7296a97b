"""Fields of Megatron's configuration that came after 0.16, whose every field was looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_btx.recipe import megatron_fields

OLDER = yaml.safe_load(Path(__file__).with_name("fields_of_0_16_1.txt").read_text())


@pytest.mark.parametrize("block", megatron_fields.SOURCES)
def test_no_field_is_new_without_being_named(block: str) -> None:
    found = megatron_fields.fields(block)
    assert found is not None
    newer = set(found) - set(OLDER[block].split())
    assert newer in (set(), set(megatron_fields.UNTRIED[block]))


@pytest.mark.parametrize(
    ("block", "key"),
    [(block, key) for block, keys in megatron_fields.UNTRIED.items() for key in keys],
)
def test_a_newer_field_is_refused(block: str, key: str) -> None:
    problem = megatron_fields.problem(block, key, None)
    assert problem is not None
    if key in (megatron_fields.fields(block) or ()):
        assert problem == ("came after Megatron-Core 0.16 and has not been tried here", "remove it")
    else:
        assert problem[0].startswith("is not a field of Megatron's")
