"""``freeze``, ``freeze_until`` and ``lr_groups``: what they name, what it costs, what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_btx.errors import UserErrors
from megatron_btx.recipe import count, freezing, stages
from megatron_btx.recipe.load import digest, dump, parse_recipe
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Training

FINETUNE = "finetune:\n"


def with_(good: str, stage: str, keys: str) -> str:
    """The recipe with more keys of a stage."""
    return good.replace(stage, f"{stage}  {keys}\n")


def test_the_groups_are_all_of_it(good: str) -> None:
    """Each tensor in one of them, of a dense model and of a mixed one."""
    recipe = parse_recipe(good)
    for name in ("seed", "finetune"):
        architecture = stages.architecture(recipe, name)
        named = [freezing.named(architecture, word) for word in freezing.WORDS]
        assert sum(map(len, named)) == len(canonical_tensors(architecture))
        assert frozenset().union(*named) == canonical_tensors(architecture).keys()


def test_experts_and_patterns(good: str) -> None:
    mixed = stages.architecture(parse_recipe(good), "finetune")
    seed = freezing.named(mixed, "experts.seed")
    assert {name.split(".")[5] for name in seed} == {"2"}
    assert len(seed) == 2 * mixed.model.num_layers
    layer = freezing.named(mixed, "decoder.layers.[01].self_attention.*")
    assert {name.split(".")[2] for name in layer} == {"0", "1"}
    copies = replace(mixed, experts=("seed.0", "seed.1", "math"))
    assert len(freezing.named(copies, "experts.seed")) == 4 * mixed.model.num_layers
    assert len(freezing.named(copies, "experts.seed.1")) == 2 * mixed.model.num_layers


def test_the_last_rate_counts(good: str) -> None:
    mixed = stages.architecture(parse_recipe(good), "finetune")
    found = freezing.rates(mixed, {"experts": 1e-3, "experts.math": 1e-4})
    assert found["decoder.layers.0.mlp.experts.0.linear_fc1.weight"] == 1e-3
    assert found["decoder.layers.0.mlp.experts.1.linear_fc1.weight"] == 1e-4


def test_flops_of_two_phases(good: str) -> None:
    """Whole steps before the boundary at the price of the frozen, the others at the full one."""
    words = "freeze: [embeddings, attention, norms, experts, head], freeze_until: 1000"
    text = with_(good, FINETUNE, words.replace(", freeze_until", "\n  freeze_until"))
    recipe = parse_recipe(text)
    block, step = recipe.finetune, 9 * 64
    architecture = stages.architecture(recipe, "finetune")
    still = freezing.frozen(architecture, block.freeze)
    whole = count.training_flops_per_token(architecture)
    cheap = freezing.flops_per_token(architecture, still)
    steps = count.steps(block, recipe.model)
    assert stages.flops(recipe, "finetune") == step * (2 * cheap + (steps - 2) * whole)
    for wanted in (1, 2, 3, steps):
        flops = step * (min(wanted, 2) * cheap + max(wanted - 2, 0) * whole)
        assert freezing.steps_for(architecture, block, recipe.model, flops) == wanted


def test_what_was_called_freeze_experts(good: str) -> None:
    """Is read, and has the same hash as what it is called now."""
    old = parse_recipe(with_(good, FINETUNE, "freeze_experts: true"))
    new = parse_recipe(with_(good, FINETUNE, "freeze: [experts]"))
    assert old == new == parse_recipe(dump(new))
    assert digest(Training(freeze=("experts",))) == digest({"freeze_experts": True})
    longer = Training(freeze=("experts", "router"))
    assert digest(longer) == digest({"freeze": ["experts", "router"]})


@pytest.mark.parametrize(
    ("stage", "keys", "words"),
    [
        ("finetune", "freeze: [atention]", ["atention", "did you mean", "attention"]),
        ("finetune", "freeze: [experts.mth]", ["experts.mth", "experts.math"]),
        ("finetune", "freeze: [ffn]", ["feed-forward layers of an MoE are `experts`"]),
        ("finetune", "freeze: ['decoder.layers.9.*']", ["decoder.layers.9", "names no tensor"]),
        ("finetune", "freeze: ['*']", ["nothing would learn"]),
        ("finetune", "freeze: router", []),
        ("finetune", "freeze_until: 1M", ["nothing is frozen"]),
        ("finetune", "lr_groups: {routers: 1e-3}", ["routers", "router"]),
        ("finetune", "lr_groups: {router: -1}", ["out of range"]),
        ("code", "freeze: [experts]", ["of a dense model are `ffn`"]),
        ("code", "freeze: [router]", ["names no tensor of a dense model"]),
        ("code", "freeze: [ffn, attention]", []),
    ],
)
def test_refused(good: str, stage: str, keys: str, words: list[str]) -> None:
    """One error, with line, key and fix; or none."""
    text = good.replace(f"{stage}:\n", f"{stage}:\n{'    ' if stage == 'code' else '  '}{keys}\n")
    if not words:
        parse_recipe(text)
        return
    with pytest.raises(UserErrors) as caught:
        parse_recipe(text)
    (error,) = caught.value.errors
    assert f"{keys.split(':')[0]}" in error.where
    for word in words:
        assert word in str(error)


@pytest.mark.parametrize("other", ["code.python", "code.7"])
def test_an_expert_is_no_part_of_another(good: str, other: str) -> None:
    """As Llama-3.1 is not of Llama-3. Where experts are cut into parts, these are called so."""
    text = good.replace("  math: {tokens: 2e6", f"  {other}: {{data: {{math: 1}}, tokens: 2e6")
    recipe = parse_recipe(text)
    mixed = stages.architecture(recipe, "finetune")
    assert mixed.experts == ("code", other, "seed")
    for number, name in enumerate(mixed.experts):
        named = freezing.named(mixed, f"experts.{name}")
        assert named
        assert all(f".mlp.experts.{number}." in tensor for tensor in named)
    several = text.replace(other, "code.7") + "mix: {method: split, num_chunks: 2}\n"
    with pytest.raises(UserErrors, match=r"code\.7: is what a part of expert code is called"):
        parse_recipe(several)


def test_until_behind_the_end(good: str) -> None:
    text = with_(good, FINETUNE, "freeze: [router]\n  freeze_until: 1M")
    with pytest.raises(UserErrors, match="not before the stage's end"):
        parse_recipe(text)
    text = with_(good, FINETUNE, "freeze: [router]\n  lr_groups: {router: 1e-3}")
    with pytest.raises(UserErrors, match="frozen throughout"):
        parse_recipe(text)


def test_a_tied_head_is_the_embedding(good: str) -> None:
    tied = good.replace("model:\n", "model:\n  untie_embeddings_and_output_weights: false\n")
    recipe = parse_recipe(with_(tied, FINETUNE, "freeze: [head]"))
    found = freezing.frozen(stages.architecture(recipe, "finetune"), recipe.finetune.freeze)
    assert found == {"embedding.word_embeddings.weight"}
