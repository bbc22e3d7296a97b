"""The reference of keys is made from the schema, whole and current."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_btx.cli.main import main
from megatron_btx.recipe import key_reference
from megatron_btx.recipe.messages import homes
from megatron_btx.recipe.schema import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_is_current() -> None:
    made = key_reference.as_markdown()
    assert PAGE.read_text() == made, "python -m megatron_btx.recipe.key_reference > docs/recipe.md"


def test_every_key_of_the_schema_is_there_once() -> None:
    names = [key.name for key in key_reference.all_keys()]
    assert len(set(names)) == len(names)
    shared = ("training.", "layout.", "megatron.", "job.")
    for home in homes(Recipe):
        last = home.rpartition(".")[2]
        assert home in names or any(prefix + last in names for prefix in shared), home


def test_every_key_says_what_it_is() -> None:
    for key in key_reference.all_keys():
        assert key.meaning, key.name
        assert key.type, key.name
        assert "``" not in key.meaning


@pytest.mark.parametrize(
    ("prefix", "names"),
    [
        ("finetune.lr", ["training.lr"]),
        ("experts.math.layout.num_threads", ["layout.num_threads"]),
        ("evaluate.layout.num_threads", ["layout.num_threads"]),
        ("lr", ["training.lr"]),
        ("seed.steps", ["training.steps"]),
        ("btm", ["btm", "btm.method"]),
        ("slurm.stages.*.nodes", []),
        ("nonsense", []),
    ],
)
def test_some_of_them(prefix: str, names: list[str]) -> None:
    assert [key.name for key in key_reference.matching(prefix)] == names


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "dare"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("mix.dare: a number; default null; 0 to 0.999\n    Share of the diff")
    assert main(["keys", "--json"]) == 0
    every = json.loads(capsys.readouterr().out)
    assert every == [dataclasses.asdict(key) for key in key_reference.all_keys()]
    assert main(["keys", "hiden_size"]) == 2
    assert "did you mean `hidden_size`?" in capsys.readouterr().err
    assert main(["keys", "learning_rate"]) == 2
    assert "did you mean `lr`?" in capsys.readouterr().err
