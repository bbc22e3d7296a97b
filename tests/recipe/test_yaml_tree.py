"""YAML that would not end, multiplies or means something else than it says: refused, one error."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.evaluate.model_spec import parse as models_of
from megatron_btx.recipe.load import dump, load_recipe, parse_recipe
from megatron_btx.recipe.messages import number
from megatron_btx.recipe.yaml_tree import parse_tree, read_tree
from megatron_btx.weights.megatron_lm_args import settings_of


def bomb(levels: int = 30, width: int = 9) -> str:
    """Lists of lists of the one before."""
    lines = ["a0: &a0 [x, x, x]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]")
    return "\n".join(lines)


def merging_bomb(levels: int = 40) -> str:
    """Blocks that take in the one before twice."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}], k{level}: 1}}")
    return "\n".join(lines) + "\nname: [*a39]"


BAD = {
    "nested": ("name: " + "[" * 100_000, "nested more than 50 deep"),
    "nested blocks": ("name:\n" + "- " * 20_000, "nested more than 50 deep"),
    "nested mappings": ("name: " + "{a: " * 100_000, "nested more than 50 deep"),
    "aliases": (bomb(), "has more than 50,000 values, those that its aliases repeat among them"),
    "values": ("name: [" + "1," * 120_000 + "1]", "more values than any recipe has (50,000)"),
    "control": (
        "name: a\nrun_dir: b\x1b[31m",
        "2: is not YAML: it has the control char",
    ),
    "NUL": ("name: a\0", "1: is not YAML: it has the control character U+0000"),
    "digits": ("name: a\nseed: {tokens: " + "9" * 5000 + "}", "seed.tokens: is a number of 5000"),
    "hexadecimal digits": ("name: 0x" + "f" * 5000, "name: is a number of 5002 digits"),
    "tag": ("name: !!python/object:os.system x", "has the tag tag:yaml.org,2002:python/object"),
    "binary": ("name: !!binary aGFsbG8=", "write plain text"),
    "no int": ("name: !!int x", "1: name: is no int"),
    "sixties": ("name: a\nlr: 1:30.5", "1:30.5 is 90.5 for YAML 1.1"),
    "twice": ("name: a\nname: b", "2: name: is set twice (also in line 1)"),
    "twice below": ("seed: {lr: 1, lr: 2}", "1: seed.lr: is set twice (also in line 1)"),
    "no key": ("1e3: 1\n2: 3", 'write "2" in quotes'),
    "merge of a list": ("name: &a [1]\nseed: {<<: *a}", "2: seed.<<: takes in what is no mapping"),
    "a circle of merges": ("name: &a {<<: *a}", "1: name: contains itself"),
    "an unknown alias": ("name: *b", "1: is not YAML: found undefined alias"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_tree(text, Path("a.yaml"))
    assert words in str(caught.value)
    assert str(caught.value).startswith("a.yaml")
    assert caught.value.fix


def test_every_reader_of_yaml_is_this_one(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    for text, words in (BAD["nested"], BAD["aliases"], BAD["twice"], BAD["control"]):
        path.write_text(text)
        for read in (
            load_recipe,
            lambda path: models_of([str(path)]),
            lambda p: settings_of(p.parent),
        ):
            with pytest.raises(UserError) as caught:
                read(path)
            assert words in str(caught.value), text[:50]


def test_merging_is_linear_and_right() -> None:
    found = parse_tree(merging_bomb(), Path("a.yaml")).plain()
    assert found["a39"] == {"k": 1} | {f"k{level}": 1 for level in range(1, 40)}
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc: &c {<<: [*a, *b], z: 3}\nd: [*c, *c]"
    found = parse_tree(text, Path("a.yaml")).plain()
    assert found["c"] == {"y": 1, "z": 3, "x": 1}, "the first of several wins, the own above all"
    assert found["d"] == [found["c"]] * 2


def test_places_that_are_no_files(tmp_path: Path) -> None:
    pipe, large = tmp_path / "pipe.yaml", tmp_path / "large.yaml"
    os.mkfifo(pipe)
    with large.open("wb") as file:
        file.truncate(1 << 40)
    for path, words in {
        pipe: "is a pipe or a device",
        Path("/dev/zero"): "is a pipe or a device",
        large: "is too large",
        tmp_path: "Is a directory",
        tmp_path / ("x" * 300 + ".yaml"): "File name too long",
    }.items():
        with pytest.raises(UserError, match=words):
            read_tree(path)
        with pytest.raises(UserError, match=words):
            load_recipe(path)


def test_no_bomb_takes_memory(tmp_path: Path) -> None:
    """In a process of its own that may have 400 MB of addresses."""
    code = (
        "import sys; from pathlib import Path; from megatron_btx.errors import UserError\n"
        "from megatron_btx.recipe.load import load_recipe\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_recipe(path)\n"
        "    except UserError: print('refused')\n"
    )
    paths = []
    for name, (text, _) in BAD.items():
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(text)
    limit = 400 << 20
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths), "/dev/zero"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stdout.splitlines() == ["refused"] * (len(BAD) + 1), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("60k", 60_000), ("60K", 60_000), ("60M", 60_000_000), ("1.5m", 1_500_000),
        ("60G", 60 * 10**9), ("60B", 60 * 10**9), ("2t", 2 * 10**12), ("1.1B", 1_100_000_000),
        ("60 k", 60_000), ("4_000_000", 4_000_000), ("1e-4", 1e-4), ("5e5", 500_000),
        ("1e3K", 1_000_000), ("-2k", -2000), ("60kk", None), ("k", None), ("0x10k", None),
        ("9" * 200 + "k", None), ("nan", None), ("1e999", None), ("07k", None),
    ],
)  # fmt: skip
def test_how_counts_may_be_written(text: str, value: float | None) -> None:
    assert number(text) == value


def test_exponents_without_a_type_are_numbers(good: str) -> None:
    tree = parse_tree("a: 1e-4\nb: '1e-4'\nc: [5e5, -.5E+3, 1e, e5]\nd: 2024-01-01", Path("a"))
    plain = tree.plain()
    assert plain == {"a": 1e-4, "b": "1e-4", "c": [5e5, -500.0, "1e", "e5"], "d": "2024-01-01"}
    text = good.replace("  lr: 1e-3", "  lr: 1e-3\n  megatron: {optimizer: {loss_scale: 5e5}}")
    recipe = parse_recipe(text)
    assert recipe.seed.megatron.optimizer == {"loss_scale": 5e5}
    assert parse_recipe(dump(recipe)) == recipe


def test_a_recipe_named_like_a_number(good: str) -> None:
    """Text stays text where text is wanted, also written out and read again."""
    for name in ("1e3", "2024-01-01"):
        recipe = parse_recipe(good.replace("name: small", f"name: {name}"))
        assert recipe.name == name
        assert parse_recipe(dump(recipe)).name == name


def test_floods_are_cut_off(good: str) -> None:
    text = good + "".join(f"key{i}: 1\n" for i in range(10_000))
    with pytest.raises(UserError) as caught:
        parse_recipe(text)
    assert len(str(caught.value)) < 20_000
    assert "and 9,980 more of this block: is not a key of a recipe" in str(caught.value)
    domains = "".join(f"  d{i}: {{builtin: cod}}\n" for i in range(3000))
    with pytest.raises(UserError) as caught:
        parse_recipe(good.replace("domains:\n", "domains:\n" + domains))
    assert len(str(caught.value)) < 20_000
    assert "and 2,950 more errors" in str(caught.value)
