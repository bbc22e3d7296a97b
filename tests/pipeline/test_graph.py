"""The stage graph: what waits for what, and what a change repeats."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, keys, state, worker
from megatron_btx.pipeline.keys import Memo
from megatron_btx.pipeline.local import run_stages
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MIXED = {"mix", "finetune"}
PAST_SEED = {"expert:code", "expert:math", "expert:prose", *MIXED, "dense"}
LAST = {"evaluate", "export", "report"}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Four domains of files of one's own."""
    lines = []
    for name in ("general", "code", "math", "prose"):
        for part in ("train", "valid"):
            (tmp_path / f"{name}-{part}.jsonl").write_text(json.dumps({"text": f"{name} {part}"}))
        lines.append(f"  {name}: {{builtin: null, train: {name}-train.jsonl, ")
        lines[-1] += f"valid: {name}-valid.jsonl}}"
    text = f"base: {EXAMPLES}/tiny/recipe.yaml\ndomains:\n" + "\n".join(lines) + "\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(tmp_path / "recipe.yaml")


def _keys(recipe: Recipe) -> dict[str, str]:
    return {stage.name: stage.key for stage in graph.build(recipe)}


def _changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before if before[name] != after.get(name)}


def _with(recipe: Recipe, **stages: dict[str, object]) -> Recipe:
    """``seed={"lr": 1}``, ``math={...}`` for the expert, ``wandb={...}``."""
    for name, fields in stages.items():
        if name in recipe.experts:
            part = dataclasses.replace(recipe.experts[name], **fields)  # type: ignore[arg-type]
            recipe = dataclasses.replace(recipe, experts={**recipe.experts, name: part})
        else:
            part = dataclasses.replace(getattr(recipe, name), **fields)
            recipe = dataclasses.replace(recipe, **{name: part})  # type: ignore[arg-type]
    return recipe


def test_built_in_text_is_made_together(tmp_path: Path) -> None:
    """Its parts are kept apart from each other, so that the size of one changes all of them."""
    changed = tmp_path / "recipe.yaml"
    base = EXAMPLES / "tiny" / "recipe.yaml"
    changed.write_text(f"base: {base}\ndomains: {{math: {{builtin_bytes: 100_000}}}}\n")
    before, after = _keys(load_recipe(base)), _keys(load_recipe(changed))
    assert _changed(before, after) == set(before)


def test_the_graph_of_branch_train_mix(recipe: Recipe) -> None:
    stages = {stage.name: stage for stage in graph.build(recipe)}
    assert set(stages["expert:math"].needs) == {"prepare", "seed"}
    assert set(stages["finetune"].needs) == {"prepare", "seed", *PAST_SEED - {"finetune", "dense"}}
    assert set(stages["dense"].needs) == {"prepare", "seed"}
    assert set(stages["evaluate"].needs) == {"prepare", "seed", *PAST_SEED} - {"mix"}
    assert stages["export"].needs == ("finetune",)
    assert set(stages["report"].needs) == set(stages) - {"report", "mix"}
    assert stages["finetune"].world_size == recipe.finetune.layout.world_size == 2
    names = list(stages)
    assert all(names.index(n) < names.index(s.name) for s in stages.values() for n in s.needs)


def test_the_other_systems_leave_stages_out(recipe: Recipe) -> None:
    """Without mix and finetuning Branch-Train-Merge, with neither experts the dense baseline, with
    copies of the seed for the experts sparse upcycling."""

    def stages(system: str, **fields: object) -> dict[str, graph.Stage]:
        made = dataclasses.replace(recipe, system=system, **fields)  # type: ignore[arg-type]
        return {stage.name: stage for stage in graph.build(made)}

    experts = {"expert:code", "expert:math", "expert:prose"}
    assert set(stages("btm")) == {"prepare", "seed", *experts, "evaluate", "report"}
    dense = stages("dense")
    assert set(dense) == {"prepare", "seed", "dense", "evaluate", "report"}
    assert dense["evaluate"].needs == ("prepare", "seed", "dense")
    assert set(stages("seed")) == {"prepare", "seed", "evaluate", "report"}
    upcycle = dataclasses.replace(recipe.mix, method="upcycle", copies=4)
    upcycled = stages("upcycling", mix=upcycle)
    assert upcycled["finetune"].needs == ("prepare", "seed", "mix")

    btx = {stage.name: stage for stage in graph.build(recipe)}
    assert all(stages(system)["seed"].key == btx["seed"].key for system in ("btm", "dense"))
    assert dense["dense"].key == btx["dense"].key
    assert upcycled["finetune"].key != btx["finetune"].key
    compute = stages("upcycling", mix=upcycle, match="compute")
    assert compute["finetune"].key != upcycled["finetune"].key


def test_the_mix_looks_ahead_at_the_finetuning(recipe: Recipe, tmp_path: Path) -> None:
    """It has its key and is done when it is, as in runs of before it was a stage; what is taken
    from a checkpoint has none."""
    stages = {stage.name: stage for stage in graph.build(recipe)}
    assert stages["mix"].key == stages["finetune"].key
    names = [stage.name for stage in graph.read_by(stages["finetune"], stages.values())]
    assert names == ["prepare", "seed", "expert:code", "expert:math", "expert:prose"]
    assert state.done(tmp_path, stages["mix"]) is None
    (tmp_path / "finetune").mkdir()
    record = json.dumps({"key": stages["finetune"].key})
    (tmp_path / "finetune" / "done.json").write_text(record)
    assert state.done(tmp_path, stages["mix"]) is not None
    assert "mix" not in [stage.name for stage in state.left(tmp_path, tuple(stages.values()))]


def test_a_stage_without_its_key_reads_no_file(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is told its key hashes no corpus."""
    whole = graph.build(recipe)
    monkeypatch.setattr(keys, "_hash", lambda path, size: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(keys, "_SEEN", {})
    assert graph.outline(recipe) == tuple(dataclasses.replace(one, key="") for one in whole)
    monkeypatch.setenv("BTX_STAGE_KEY", "told")
    assert worker.stage_of(recipe, "expert:math", Path(recipe.run_dir)).key == "told"


def test_experts_without_tokens_are_the_seed(recipe: Recipe) -> None:
    stage = graph.find(graph.build(_with(recipe, math={"tokens": 0})), "expert:math")
    assert (stage.kind, stage.needs) == ("import", ("seed",))


def test_optional_stages(recipe: Recipe) -> None:
    without = dataclasses.replace(_with(recipe, export={"format": "none"}), dense=None)
    names = {stage.name for stage in graph.build(without)}
    assert names == set(_keys(recipe)) - {"dense", "export"}


@pytest.mark.parametrize(
    ("change", "repeated"),
    [
        (lambda r: _with(r, seed={"lr": 7e-4}), {"seed"} | PAST_SEED | LAST),
        (lambda r: _with(r, math={"lr": 7e-4}), {"expert:math"} | MIXED | LAST),
        (lambda r: _with(r, math={"tokens": 999}), {"expert:math", "dense"} | MIXED | LAST),
        (lambda r: _with(r, finetune={"lr": 7e-4}), MIXED | LAST),
        (lambda r: _with(r, finetune={"micro_batch_size": 2}), MIXED | LAST),
        (lambda r: _with(r, seed={"micro_batch_size": 2}), set()),
        (lambda r: _with(r, routing={"balance_loss_coeff": 0.0}), MIXED | LAST),
        (lambda r: _with(r, mix={"router_init": "zeros"}), MIXED | LAST),
        (lambda r: _with(r, dense={"lr": 7e-4}), {"dense", "evaluate", "report"}),
        (lambda r: _with(r, evaluate={"tokens": 4096}), {"evaluate", "report"}),
        (lambda r: _with(r, export={"check": False}), {"export", "report"}),
        (lambda r: _with(r, wandb={"mode": "disabled"}), set()),
        (lambda r: dataclasses.replace(r, max_parallel_jobs=1, name="other", run_dir="x"), set()),
        (lambda r: _with(r, seed={"save_interval": 3, "keep_checkpoints": 9}), set()),
        (
            lambda r: _with(r, seed={"layout": dataclasses.replace(r.seed.layout, num_threads=2)}),
            set(),
        ),
        (lambda r: dataclasses.replace(r, random_seed=5), {"seed"} | PAST_SEED | LAST),
    ],
)
def test_a_change_repeats_what_follows_from_it_and_nothing_else(
    recipe: Recipe, change: Callable[[Recipe], Recipe], repeated: set[str]
) -> None:
    assert _changed(_keys(recipe), _keys(change(recipe))) - {"prepare"} == repeated


def test_one_domains_data(recipe: Recipe, tmp_path: Path) -> None:
    """What the seed, its tokenizer and the other experts do not read leaves them as they are."""
    recipe = _with(recipe, seed={"data": {"general": 1.0}})
    before = _keys(recipe)
    (tmp_path / "math-train.jsonl").write_text(json.dumps({"text": "another"}))
    expected = {"prepare", "expert:math", "dense"} | MIXED | LAST
    assert _changed(before, _keys(recipe)) == expected


def test_a_touched_or_moved_file_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    before = _keys(recipe)
    for path in tmp_path.glob("*.jsonl"):
        os.utime(path, (1, 1))
    assert _keys(recipe) == before


def test_the_memo_sees_every_change(tmp_path: Path) -> None:
    file, place = tmp_path / "a.jsonl", tmp_path / "memo.json"
    file.write_text("one")
    memo = Memo(place)
    first = memo.file(file)
    memo.save()
    assert Memo(place).file(file) == first
    file.write_text("two")
    os.utime(file, (1, 1))
    assert Memo(place).file(file) != first
    place.write_text("{")
    assert Memo(place).file(file) == Memo().file(file)


def test_a_large_file_is_sampled_at_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    with file.open("wb") as stream:
        stream.truncate(40 << 20)
    first = Memo().file(file)
    for place in (0, (40 << 20) - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"x")
        os.utime(file, (place, place))  # two writes may come in one tick of the file system's clock
        second = Memo().file(file)
        assert second != first
        first = second


def test_the_longest_way_starts_first(recipe: Recipe) -> None:
    names = [stage.name for stage in run_stages.in_order(graph.build(recipe))]
    assert names.index("dense") < names.index("expert:math") < names.index("finetune")


def test_unknown_stage(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="did you mean expert:math") as found:
        graph.until(graph.build(recipe), "expert-mth")
    assert "choose prepare, seed, expert:code" in found.value.fix


def test_the_papers_seed_is_taken_not_trained() -> None:
    stages = graph.build(load_recipe(EXAMPLES / "paper_7b" / "recipe.yaml"))
    seed = graph.find(stages, "seed")
    assert (seed.kind, seed.needs, seed.world_size) == ("import", (), 1)
