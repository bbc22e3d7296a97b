"""What is asked of a machine and its disk, beside the recipe itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline import graph
from megatron_btx.recipe import check, check_paths, megatron_fields, run_plan, systems
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.schema import Layout, Recipe


def test_files(good: str, tmp_path: Path) -> None:
    recipe = parse_recipe(good)
    with pytest.raises(UserErrors, match=r"domains\.math\.train: .*does not exist"):
        check_paths.files(recipe)
    data = tmp_path / "data"
    data.mkdir()
    (data / "math.jsonl").write_text("")
    (data / "held.jsonl").write_text('{"text": "a"}\n')
    recipe = parse_recipe(good, tmp_path / "recipe.yaml")
    with pytest.raises(UserErrors) as caught:
        check_paths.files(recipe)
    assert [error.where for error in caught.value.errors] == ["domains.math.train"]
    assert "is empty" in str(caught.value)
    (data / "math.jsonl").write_text('{"text": "a"}\n')
    check_paths.files(recipe)


def test_a_directory_that_is_missing_is_one_error(good: str, tmp_path: Path) -> None:
    text = good.replace("[data/held.jsonl]", "[data/a.jsonl, data/b.jsonl, data/c.jsonl]")
    recipe = parse_recipe(text, tmp_path / "recipe.yaml")
    with pytest.raises(UserError) as caught:
        check_paths.files(recipe)
    said = str(caught.value)
    assert said.count("does not exist") == 1
    assert f"{tmp_path / 'data'} does not exist, of which the recipe names math.jsonl, " in said
    assert "b.jsonl and 1 more" in said


@pytest.mark.parametrize("name", ["code", "expert-code", "expert:cod"])
def test_a_model_of_another_name_is_guessed(good: str, name: str) -> None:
    with pytest.raises(UserError, match="did you mean expert:code"):
        systems.row_of(parse_recipe(good), name)


def test_gloo() -> None:
    check.refuse_on_gloo(Layout(expert_model_parallel_size=4))
    with pytest.raises(UserError, match="gloo"):
        check.refuse_on_gloo(Layout(tensor_model_parallel_size=2, expert_model_parallel_size=2))


@pytest.mark.parametrize("place", ["seed", "experts.math", "finetune", "evaluate", "training"])
def test_context_parallelism_is_refused_everywhere(good: str, place: str, tmp_path: Path) -> None:
    """Whatever is installed: no machine divides a sequence over ranks."""
    block = "{layout: {context_parallel_size: 2}}"
    for part in reversed(place.split(".")[1:]):
        block = f"{{{part}: {block}}}"
    (tmp_path / "base.yaml").write_text(good)
    over = tmp_path / "over.yaml"
    over.write_text(f"base: base.yaml\n{place.split('.')[0]}: {block}\n")
    with pytest.raises(UserErrors) as caught:
        load_recipe(over)
    where = f"over.yaml:2: {place}.layout.context_parallel_size"
    wrong = [error for error in caught.value.errors if error.where.endswith(where)]
    assert "context parallelism is not supported" in wrong[0].what


BOUNDARIES = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


def test_boundaries_of_documents(good: str, tmp_path: Path) -> None:
    """Alike in all stages; position ids alone are refused by name; absent or false is one key."""
    (tmp_path / "base.yaml").write_text(good)
    plain, over = load_recipe(tmp_path / "base.yaml"), tmp_path / "over.yaml"

    def read(text: str) -> Recipe:
        over.write_text(f"base: base.yaml\n{text}\n")
        return load_recipe(over)

    assert read(f"training: {{{': false, '.join(BOUNDARIES)}: false}}") == plain
    with pytest.raises(UserErrors, match=r"finetune.reset_position_ids: is not supported alone: .*"
                                         "does not look at position ids"):  # fmt: skip
        read("finetune: {reset_position_ids: true}")
    for name in BOUNDARIES[1:]:
        with pytest.raises(
            UserErrors, match=rf"seed\.{name}: is .*\n  fix: set it under `training"
        ):
            read(f"finetune: {{{name}: true}}")
        assert keys(read(f"training: {{{name}: true}}")).isdisjoint(keys(plain))
    with_mask = read("training: {reset_attention_mask: true}")
    both = read("training: {reset_attention_mask: true, reset_position_ids: true}")
    assert keys(both) == keys(with_mask)


def keys(recipe: Recipe) -> set[str]:
    """Of all that is trained or measured."""
    apart = ("prepare", "report")
    return {stage.key for stage in graph.build(recipe) if stage.kind not in apart}


@pytest.mark.parametrize("block", megatron_fields.SOURCES)
def test_fields_are_those_of_the_imported_classes(block: str) -> None:
    """The parsed source against the classes themselves."""
    import dataclasses

    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    classes = {
        "transformer": TransformerConfig,
        "ddp": DistributedDataParallelConfig,
        "optimizer": OptimizerConfig,
    }
    found = megatron_fields.fields(block)
    assert found is not None
    names = {field.name for field in dataclasses.fields(classes[block])}
    assert set(found) == {name for name in names if not name.startswith("_")}
    assert set(megatron_fields.OWNED[block]) <= names


def test_values_of_megatrons_fields() -> None:
    def fine(block: str, key: str, value: object) -> bool:
        return megatron_fields.problem(block, key, value) is None

    assert fine("transformer", "recompute_granularity", "full")
    assert fine("transformer", "recompute_granularity", None)
    assert not fine("transformer", "recompute_granularity", "half")
    assert fine("transformer", "recompute_modules", ["mlp"])
    assert not fine("transformer", "recompute_modules", "mlp")
    assert fine("ddp", "overlap_grad_reduce", True)
    assert not fine("ddp", "overlap_grad_reduce", 1)
    assert fine("ddp", "bucket_size", 1000)
    assert not fine("ddp", "bucket_size", True)


def test_weights_of_a_domain(good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good)
    over = tmp_path / "over.yaml"
    for weights, said in (("[1, 2]", "are 2 for the 1 paths"), ("[0]", "range"), ("[.nan]", "nan")):
        over.write_text(f"base: base.yaml\ndomains: {{math: {{weights: {weights}}}}}\n")
        with pytest.raises(UserErrors, match=rf"domains\.math\.weights.*: .*{said}"):
            load_recipe(over)
    over.write_text("base: base.yaml\ndomains: {math: {weights: 3}}\n")
    assert load_recipe(over).domains["math"].weights == (3.0,)


TRAINING = """\
training:
  global_batch_size: 8
  lr: 1e-3
  layout: {num_threads: 2}
"""


def test_a_finetuning_begins_with_the_mix(good: str) -> None:
    """It is missed where the system has it, and cannot be of another model."""
    lines = good.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("finetune:"))
    end = next(n for n in range(begin + 1, len(lines)) if lines[n][:1].strip(" #"))
    without = "\n".join([*lines[:begin], *lines[end:]]) + "\n"
    assert TRAINING in without, "whose settings a block inherits, and is none the less missing"
    for block in ("", "finetune: {}", "finetune: {tokens: 0}", "finetune: {lr: 1e-4}"):
        for text in (without, without.replace(TRAINING, "")):
            with pytest.raises(UserErrors, match=r"finetune.tokens: is missing, or 0.*\n.*experts"):
                parse_recipe(text + block)
    other = f"{without}system: experts\n".replace("dense: {}\n", "")
    assert parse_recipe(other).finetune.tokens == 0
    with pytest.raises(UserErrors, match="finetune.from: a finetuning starts from the mix"):
        parse_recipe(f"{without}finetune: {{from: there}}\n")


def test_a_plan_that_trains_nothing(good: str) -> None:
    recipe = parse_recipe(good)
    seed = replace(recipe.seed, from_="there", tokens=0)
    made = run_plan.plan(replace(recipe, system="seed", seed=seed, dense=None))
    assert not any(stage.steps for stage in made.stages)
    assert "seed is taken from there." in run_plan.notes(made)


def test_an_ensemble_by_text_needs_all_models_text(good: str) -> None:
    """A seed that was taken does not say what it was trained on; told before anything is run."""
    taken = good.replace("seed: {tokens: 4M, data: {code: 0.5, math: 0.5}}", "seed: {from: there}")
    text = taken.replace("dense: {}\n", "") + "system: btm\n"
    with pytest.raises(
        UserErrors, match=r"seed.data: is missing: btm.method top2 compares contexts"
    ):
        parse_recipe(text)
    parse_recipe(text + "btm: {method: posterior}\n")
    parse_recipe(text.replace("{from: there}", "{from: there, data: {code: 1}}"))
