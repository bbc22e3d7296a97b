"""What is asked of a machine and its disk, beside the recipe itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.recipe import check, upstream
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.schema import Layout


def test_files(good: str, tmp_path: Path) -> None:
    recipe = parse_recipe(good)
    with pytest.raises(UserErrors, match=r"domains\.math\.train: .*does not exist"):
        check.files(recipe)
    data = tmp_path / "data"
    data.mkdir()
    (data / "math.jsonl").write_text("")
    (data / "held.jsonl").write_text('{"text": "a"}\n')
    recipe = parse_recipe(good, tmp_path / "recipe.yaml")
    with pytest.raises(UserErrors) as caught:
        check.files(recipe)
    assert [error.where for error in caught.value.errors] == ["domains.math.train"]
    assert "is empty" in str(caught.value)
    (data / "math.jsonl").write_text('{"text": "a"}\n')
    check.files(recipe)


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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("reset_position_ids", "does not look at position ids"),
        ("reset_attention_mask", "mask of documents"),
        ("eod_mask_loss", "depend on micro_batch_size"),
    ],
)
def test_document_boundaries_are_refused_by_name(
    good: str, name: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(good)
    over = tmp_path / "over.yaml"
    over.write_text(f"base: base.yaml\ntraining: {{{name}: false}}\n")
    assert load_recipe(over) == load_recipe(tmp_path / "base.yaml")
    over.write_text(f"base: base.yaml\nfinetune: {{{name}: true}}\n")
    with pytest.raises(UserErrors, match=f"finetune.{name}: is not supported: .*{why}"):
        load_recipe(over)


@pytest.mark.parametrize("block", upstream.SOURCES)
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
    found = upstream.fields(block)
    assert found is not None
    names = {field.name for field in dataclasses.fields(classes[block])}
    assert set(found) == {name for name in names if not name.startswith("_")}
    assert set(upstream.OWNED[block]) <= names


def test_values_of_megatrons_fields() -> None:
    def fine(block: str, key: str, value: object) -> bool:
        return upstream.problem(block, key, value) is None

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
