"""Reading recipes: values, inheritance, hashes, where a run lies."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline import graph
from megatron_btx.recipe import load, run_plan
from megatron_btx.recipe.load import digest, dump, dump_kept, load_recipe, parse_recipe
from megatron_btx.recipe.schema import Layout, Training


def test_values(good: str, tmp_path: Path) -> None:
    recipe = parse_recipe(good, tmp_path / "recipe.yaml")
    assert recipe.run_dir == str(tmp_path / "runs/small")
    assert recipe.seed.tokens == 4_000_000
    assert recipe.experts["math"].tokens == 2_000_000
    assert recipe.seed.lr == 1e-3
    assert recipe.domains["math"].train == (str(tmp_path / "data/math.jsonl"),)
    assert recipe.domains["math"].valid == (str(tmp_path / "data/held.jsonl"),)
    assert recipe.experts["code"].data == {"code": 1.0}
    assert recipe.model_names == ("code", "math", "seed")


def test_training_is_inherited_key_by_key(good: str) -> None:
    recipe = parse_recipe(good)
    assert recipe.dense is not None
    assert recipe.seed.layout == Layout(num_threads=2)
    assert recipe.experts["math"].layout == Layout(num_threads=2, data_parallel_size=2)
    assert recipe.finetune.global_batch_size == 9
    assert recipe.finetune.lr == recipe.dense.lr == 1e-3
    assert recipe.seed.adam_beta2 == Training().adam_beta2


def test_null_is_the_default(good: str) -> None:
    """Of a number, a choice and a list; of ``steps`` and ``tokens``, what the other says."""
    empty = "  lr: null\n  steps: null\n  lr_decay_style: null\n  freeze: null"
    text = good.replace("  lr: 1e-3", empty)
    recipe = parse_recipe(f"{text}\nmix: {{average: null}}\n")
    assert recipe.seed.lr == Training().lr
    assert recipe.seed.lr_decay_style == Training().lr_decay_style
    assert recipe.seed.freeze == ()
    assert recipe.mix.average == "uniform"
    assert recipe.seed.tokens == 4_000_000
    other = parse_recipe(good.replace("tokens: 2e6", "tokens: null, steps: 3"))
    assert other.experts["math"].tokens == 3 * 8 * 64


def test_dense_tokens_are_those_of_experts_and_finetune(good: str) -> None:
    recipe = parse_recipe(good)
    assert recipe.dense is not None
    step, finetune_step = 8 * 64, 9 * 64
    experts = -(-1_000_000 // step) + -(-2_000_000 // step)
    assert recipe.dense.tokens == experts * step + -(-1_000_000 // finetune_step) * finetune_step


def test_round_trip(good: str) -> None:
    recipe = parse_recipe(good)
    again = parse_recipe(dump(recipe))
    assert again == recipe
    assert digest(again) == digest(recipe)
    kept = parse_recipe(dump_kept(recipe, Path("runs/small")), "/elsewhere/recipe.yaml")
    assert kept == replace(recipe, run_dir=str(Path("runs/small").absolute()))


def test_digest_is_of_the_content(good: str) -> None:
    recipe = parse_recipe(good)
    other = parse_recipe(good.replace("tokens: 2e6", "tokens: 2_000_000"))
    changed = parse_recipe(good.replace("tokens: 2e6", "tokens: 3e6"))
    assert digest(recipe.experts["math"]) == digest(other.experts["math"])
    assert digest(recipe.experts["math"]) != digest(changed.experts["math"])
    assert digest(recipe.experts["code"]) == digest(changed.experts["code"])
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})


def test_base(good: str, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "base.yaml").write_text(good)
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: up/base.yaml\nname: child\nexperts: {math: {tokens: 5M}}\n"
        "seed: {data: {code: 1}}\ndense: null\ntraining: {layout: {num_threads: 1}}\n"
    )
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert recipe.dense is None
    assert list(recipe.experts) == ["code", "math"]
    assert recipe.experts["math"].tokens == 5_000_000
    assert recipe.experts["math"].layout.data_parallel_size == 2
    assert recipe.experts["math"].layout.num_threads == 1
    assert recipe.seed.data == {"code": 1.0}, "a mixture is one value"
    assert recipe.domains["math"].train == (str(tmp_path / "up/data/math.jsonl"),)


def test_an_empty_training_block_forgets_that_of_the_base(good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good)
    (tmp_path / "child.yaml").write_text("base: base.yaml\nname: child\ntraining:\n")
    assert load_recipe(tmp_path / "base.yaml").seed.lr == 1e-3
    assert load_recipe(tmp_path / "child.yaml").seed.lr == Training().lr


def test_home_in_a_base(good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "base.yaml").write_text(good)
    (tmp_path / "child.yaml").write_text("base: ~/base.yaml\nname: child\n")
    assert load_recipe(tmp_path / "child.yaml").name == "child"


def test_text_that_looks_like_a_number_stays_text(good: str) -> None:
    """A run's kept recipe says the same as the one that it was begun with."""
    text = f"{good}slurm: {{environment: {{A: '1e5', B: '12e45678', C: '1_0e3', D: x, E: 1e5}}}}\n"
    recipe = parse_recipe(text)
    given = {"A": "1e5", "B": "12e45678", "C": "1_0e3", "D": "x", "E": 1e5}
    assert parse_recipe(dump(recipe)).slurm.environment == recipe.slurm.environment == given


def test_what_a_recipe_says_otherwise(good: str) -> None:
    other = good.replace("tokens: 2e6", "tokens: 3e6").replace("name: small", "run_dir: x\nname: b")
    changed = load.changes(parse_recipe(good), parse_recipe(other + "mix: {ties: 0.5}\n"))
    assert changed[0] == "name: small -> b"
    assert "experts.math.tokens: 2000000 -> 3000000" in changed
    assert "mix.ties: nothing -> 0.5" in changed
    assert not any("run_dir" in one or "seed" in one for one in changed)
    assert load.changes(parse_recipe(good), parse_recipe(good)) == []


def test_names_that_are_no_utf8_have_a_hash() -> None:
    """Python's text for the bytes of a file's name."""
    assert digest(["caf\udce9"]) != digest(["caf\u00e9"])


def test_base_that_starts_from_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="starts from this recipe"):
        load_recipe(tmp_path / "a.yaml")


def test_experts_without_tokens_are_sparse_upcycling(good: str) -> None:
    text = good.replace("tokens: 1_000_000", "tokens: 0").replace("tokens: 2e6", "tokens: 0")
    recipe = parse_recipe(text)
    assert [expert.tokens for expert in recipe.experts.values()] == [0, 0]


def test_the_room_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_btx.recipe import check, check_layout, count, load; "
        "from megatron_btx.recipe import megatron_fields, memory, run_plan; "
        "assert megatron_fields.fields('transformer'); "
        "print(sorted({'torch', 'numpy', 'megatron.core'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_steps_say_tokens(good: str, tmp_path: Path) -> None:
    """The same recipe, the same keys of its stages."""
    text = good.replace("tokens: 2e6, layout", "steps: 3907, layout")
    recipe, same = parse_recipe(text), parse_recipe(good.replace("2e6", str(3907 * 8 * 64)))
    assert recipe.experts["math"].tokens == 3907 * 8 * 64
    assert recipe == same
    assert [s.key for s in graph.build(recipe)] == [s.key for s in graph.build(same)]
    both = good.replace("tokens: 2e6,", "tokens: 2e6, steps: 5,")
    with pytest.raises(UserErrors, match=r"experts\.math\.steps: stands beside `tokens`"):
        parse_recipe(both)
    with pytest.raises(UserErrors, match=r"steps: is 0, out of range"):
        parse_recipe(good.replace("tokens: 2e6,", "steps: 0,"))
    with pytest.raises(UserErrors, match=r"dense\.steps: is derived"):
        parse_recipe(good.replace("dense: {}", "dense: {steps: 3}"))
    (tmp_path / "base.yaml").write_text(good)
    over = tmp_path / "over.yaml"
    over.write_text("base: base.yaml\nseed: {steps: 7}\ntraining: {steps: 9}\n")
    over_it = load_recipe(over)
    assert over_it.seed.tokens == 7 * 8 * 64
    assert over_it.experts["math"].tokens == 2_000_000, "a stage's own tokens are above training"


def test_a_run_lies_beside_its_recipe_wherever_btx_is_started(
    good: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one that an earlier release began from the current directory goes on, with a hint."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for place in (here, elsewhere):
        place.mkdir()
    (here / "recipe.yaml").write_text(good + "share: [runs/other*]\n")
    monkeypatch.chdir(elsewhere)
    found = load_recipe(here / "recipe.yaml")
    assert found.run_dir == str(here / "runs/small")
    assert found.share == (str(here / "runs/other*"),)
    assert load_recipe("../here/recipe.yaml").run_dir == "../here/runs/small"
    assert capsys.readouterr().err == ""
    (elsewhere / "runs" / "small").mkdir(parents=True)
    (elsewhere / "runs" / "other_1").mkdir()
    found = load_recipe(here / "recipe.yaml")
    assert (found.run_dir, found.share) == ("runs/small", ("runs/other*",))
    assert "run_dir: runs/small is taken from the current directory" in capsys.readouterr().err
    (here / "runs" / "small").mkdir(parents=True)
    assert load_recipe(here / "recipe.yaml").run_dir == str(here / "runs/small")


def test_a_run_dir_stands_from_the_file_that_names_it(good: str, tmp_path: Path) -> None:
    (tmp_path / "over").mkdir()
    (tmp_path / "base.yaml").write_text(good + "run_dir: made/{name}\n")
    over = tmp_path / "over" / "recipe.yaml"
    over.write_text("base: ../base.yaml\nname: other\n")
    assert load_recipe(over).run_dir == str(tmp_path / "made" / "other")
    over.write_text("base: ../base.yaml\nrun_dir: /some/where\n")
    assert load_recipe(over).run_dir == "/some/where"


def test_a_stage_that_ends_in_its_warm_up_is_warned_of(good: str) -> None:
    recipe = parse_recipe(good.replace("tokens: 2e6,", "tokens: 500,"))
    assert list(run_plan.warnings(recipe)) == [
        "experts.math: 1 step under a warm-up of 100: the learning rate never reaches its peak; "
        "give more `tokens`, or lower `lr_warmup_iters`"
    ]
    assert not list(run_plan.warnings(parse_recipe(good)))


KEYS = {
    "systems/btm_top1": "5a27ff99ef966e3c",
    "ablations/btx_soft": "7dd7fc9ff492c3ad",
    "demo/recipe": "2607841baad91d62",  # of its routers from centroids
    "paper_7b/recipe": "e8ae68d5b1fafd9b",
}


@pytest.mark.parametrize("name", KEYS)
def test_content_keys_of_the_examples_stay_what_they_are(name: str) -> None:
    """A run begun with an earlier version goes on: renamed keys and new fields change no hash."""
    recipe = load_recipe(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    keys = [(s.name, s.key) for s in graph.build(recipe) if s.name != "mix"]
    assert digest(keys)[:16] == KEYS[name]


def test_the_former_name_of_the_method(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = good + "system: btm\nmix: {method: btx}\n"
    old = parse_recipe(base + "btm: {select: top1}\n")
    new = parse_recipe(base + "btm: {method: top1}\n")
    assert old == new
    assert "btm.select is called `method` now" in capsys.readouterr().err
    assert "method: top1" in dump(old)
    assert [s.key for s in graph.build(old)] == [s.key for s in graph.build(new)]


def test_what_a_base_has_is_left_out_by_null(good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good)
    fewer = tmp_path / "fewer.yaml"
    fewer.write_text("base: base.yaml\nexperts: {math: null}\n")
    assert list(load_recipe(fewer).experts) == ["code"]
    fewer.write_text("base: base.yaml\nexperts: {law: null}\n")  # which none has
    with pytest.raises(UserErrors, match=r"experts.law.tokens: is missing"):
        load_recipe(fewer)


def test_a_run_is_where_its_directory_lies(good: str, tmp_path: Path) -> None:
    """Moved or copied, its kept recipe still says where it was."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "recipe.yaml").write_text(f"{good}run_dir: {made}\n")
    (made / "lock").touch()
    assert load_recipe(made / "recipe.yaml").run_dir == str(made)
    (tmp_path / "link").symlink_to(made)
    assert load_recipe(tmp_path / "link" / "recipe.yaml").run_dir == str(made)
    shutil.copytree(made, tmp_path / "copy")
    assert load_recipe(tmp_path / "copy" / "recipe.yaml").run_dir == str(tmp_path / "copy")
    made.rename(tmp_path / "moved")
    assert load_recipe(tmp_path / "moved" / "recipe.yaml").run_dir == str(tmp_path / "moved")
    (tmp_path / "moved" / "lock").unlink()  # a recipe of that name that no run has written
    assert load_recipe(tmp_path / "moved" / "recipe.yaml").run_dir == str(made)
