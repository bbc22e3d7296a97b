"""Recipes and descriptions of models with values put in their places at random (by seed): each is
read, or is one error; nothing else leaves the reader."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_btx.errors import UserError
from megatron_btx.evaluate.model_spec import parse
from megatron_btx.families.hf import FAMILIES, read_config
from megatron_btx.pipeline import graph
from megatron_btx.recipe import run_plan
from megatron_btx.recipe.load import dump, load_recipe, parse_recipe
from megatron_btx.weights.manifest import FORMAT, read_manifest
from megatron_btx.weights.megatron_lm_args import architecture_of
from tests.families.test_descriptions import MOE, SETTINGS, config_of

EXAMPLES = Path(__file__).parents[2] / "examples"
VALUES = (
    *(None, 0, -1, 1, 2, 7, 2.5, 1e9, 10**18, 10**30, math.nan, math.inf, 1e-300, True, False),
    *("", "2", "x" * 300, "false", "a/b", "\0", "\x1b[2J", "a\nb", "~", "topk", "split", "linear"),
    *([], [1], [[1]], ["a"], [{}], {}, {"a": 1}, {"rope_type": "llama3", "factor": 8.0}),
)
NEW = (
    "steps",
    "from",
    "select",
    "layout",
    "num_experts",
    "rope_scaling",
    "layer_types",
    "model_type",
)


def mutated(content: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three values of a tree changed, removed or added."""
    whole: dict[str, Any] = json.loads(json.dumps(content))
    for _ in range(draw.choice((1, 1, 2, 3))):
        block = whole
        while block:
            key = draw.choice(list(block))
            if isinstance(block[key], dict) and block[key] and draw.random() < 0.85:
                block = block[key]
                continue
            kind = draw.random()
            if kind < 0.1:
                del block[key]
            else:
                block[key if kind > 0.2 else draw.choice(NEW)] = draw.choice(VALUES)
            break
    return whole


def try_all(read: Callable[[dict[str, Any]], object], bases: list[dict[str, Any]], n: int) -> None:
    """Read ``n`` mutations; some are right, most are refused, in bounded words."""
    said: list[str] = []
    for seed in range(n):
        draw = random.Random(seed)
        content = mutated(draw.choice(bases), draw)
        try:
            read(content)
        except UserError as error:
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {content}") from error
    assert max(map(len, said)) < 20_000
    assert n // 4 < len(said) < n


@pytest.mark.parametrize("example", ["demo/recipe", "systems/btm_top1", "ablations/btx_split_top4"])
def test_recipes(example: str) -> None:
    def read(content: dict[str, Any]) -> None:
        recipe = parse_recipe(yaml.safe_dump(content, sort_keys=False))
        run_plan.plan(recipe)
        graph.build(recipe)
        assert parse_recipe(dump(recipe)) == recipe

    whole = yaml.safe_load(dump(load_recipe(EXAMPLES / f"{example}.yaml")))
    try_all(read, [whole], 25)


def test_configurations_of_hugging_face(tmp_path: Path) -> None:
    def read(content: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(content))
        read_config(tmp_path)

    try_all(read, [config_of(family) for family in FAMILIES], 600)


def test_manifests(tmp_path: Path) -> None:
    def read(content: dict[str, Any]) -> None:
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        read_manifest(tmp_path)

    try_all(read, [{"format": FORMAT, **MOE.to_json()}], 300)


def test_arguments_of_megatron_lm() -> None:
    more = {"num_experts": 4, "moe_layer_freq": 1, "use_rope_scaling": False, "norm_epsilon": 1e-5}
    try_all(lambda content: architecture_of(content, "iter"), [SETTINGS, SETTINGS | more], 300)


def test_sets_of_models(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    whole = {
        "method": "top1",
        "models": {"a": "a", "b": "b"},
        "text": {"a": "x", "b": ["y"]},
        "prior": {"a": 1, "b": 2},
        "context": "prefix",
    }

    def read(content: dict[str, Any]) -> None:
        (tmp_path / "set.yaml").write_text(yaml.safe_dump(content))
        parse([str(tmp_path / "set.yaml")])

    try_all(read, [whole], 100)
