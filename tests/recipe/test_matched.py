"""``match: compute``, by the FLOPs of every system written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.errors import UserErrors
from megatron_btx.recipe import count, run_plan, stages
from megatron_btx.recipe.load import load_recipe, parse_recipe
from megatron_btx.recipe.schema import Recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BASE = EXAMPLES / "four_domains" / "base.yaml"


def system(name: str) -> Recipe:
    (file,) = EXAMPLES.glob(f"*/{name}.yaml")
    return load_recipe(file, BASE)


@pytest.mark.parametrize(
    "name", ["dense_cm", "btm_posterior_cm", "upcycling_cm", "upcycling_drop", "btx_sample_top1"]
)
def test_costs_what_btx_does(name: str) -> None:
    """By what ``btx plan`` says of each stage."""
    assert run_plan.plan(system(name)).system_flops == pytest.approx(
        run_plan.plan(system("btx_top2")).system_flops, rel=0.01
    )


def test_the_recommended_recipe_costs_what_btx_does() -> None:
    best = run_plan.plan(load_recipe(EXAMPLES / "best" / "recipe.yaml"))
    assert best.system_flops == pytest.approx(
        run_plan.plan(system("btx_top2")).system_flops, rel=0.01
    )


def test_dense_reads_the_finetunings_mixture_for_longer() -> None:
    """The experts' samples, then the mixture until the FLOPs are used up."""
    recipe, data = system("dense_cm"), system("dense")
    experts, (finetune,) = stages.reads(recipe, "dense")
    assert experts == stages.reads(data, "dense")[0]
    of_data = stages.reads(data, "dense")[1][0]
    assert finetune.stage == of_data.stage
    assert finetune.block.data == of_data.block.data
    assert finetune.block.tokens > of_data.block.tokens
    whole = [count.trained_tokens(part.block, recipe.model) for part in (*experts, finetune)]
    assert sum(whole) == stages.training(recipe, "dense").tokens


def test_experts_are_lengthened_by_one_factor() -> None:
    recipe, data = system("btm_posterior_cm"), system("btm_posterior")
    factors = []
    for domain, block in data.experts.items():
        longer = stages.training(recipe, f"expert:{domain}")
        factors.append(longer.tokens / count.trained_tokens(block, recipe.model))
        assert longer.data == block.data
    assert max(factors) - min(factors) < 0.01
    assert min(factors) > 1


TAKEN = "base: {base}\nname: x\nsystem: {system}\nmatch: compute\nexperts: {experts}\n"


def test_what_is_taken_is_not_lengthened(tmp_path: Path) -> None:
    """The others make up for it; where all are taken there is nothing to lengthen."""
    experts = "{math: {from: m}, code: {}, wiki: {tokens: 0}}"
    text = TAKEN.format(base=BASE, system="btm", experts=experts)
    recipe = parse_recipe(text, tmp_path / "r.yaml")
    assert stages.training(recipe, "expert:math").tokens == recipe.experts["math"].tokens
    assert stages.training(recipe, "expert:wiki").tokens == 0
    tokens = sum(stages.training(recipe, f"expert:{name}").tokens for name in recipe.experts)
    flops = tokens * count.training_flops_per_token(count.dense_architecture(recipe))
    assert flops == pytest.approx(stages.btx_flops(recipe), rel=0.01)
    nothing = "{math: {from: m}, code: {from: c}, wiki: {from: w}}"
    with pytest.raises(UserErrors, match="nothing is trained after the seed"):
        parse_recipe(TAKEN.format(base=BASE, system="btm", experts=nothing), tmp_path / "r.yaml")
    with pytest.raises(UserErrors, match="nothing is trained after the seed"):
        parse_recipe(TAKEN.format(base=BASE, system="seed", experts="{}"), tmp_path / "r.yaml")


def test_steps_too_long_are_refused(tmp_path: Path) -> None:
    """Within 1% is matched."""
    text = TAKEN.format(base=BASE, system="btm", experts="{}")
    text += "training: {global_batch_size: 8192}\n"
    with pytest.raises(UserErrors, match="miss the training FLOPs of BTX by"):
        parse_recipe(text, tmp_path / "r.yaml")
