"""Experts exchanged in a finished MoE: whoever is not named stays as it is, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.mix.btx import btx
from megatron_btx.mix.edit_experts import append, drop, only, replace_expert
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import read_whole
from tests.mix.test_anchored import trained
from tests.mix.test_mixes import F64, LAYER, TOP2, dense_ffn, expert, memory, tensor
from tests.weights.models import dense

F32 = torch.float32


def made(labels: str = "abc") -> Checkpoint:
    models = [dense(label, number) for number, label in enumerate(labels)]
    return memory(btx(models, routing=TOP2, dtype=F32), "moe")


def same_when_forced(before: Checkpoint, plan: Plan, names: str) -> None:
    """Every weight that an expert's tokens meet, all others forced away: so are their logits."""
    for name in names:
        old = forced(copy(before, dtype=F32), before.architecture.experts.index(name))
        new = forced(plan, plan.architecture.experts.index(name))
        for key in old.targets:
            assert torch.equal(new.evaluate(key), old.evaluate(key)), (name, key)


def test_the_others_are_untouched() -> None:
    moe, other = made(), dense("new", 9)
    same_when_forced(moe, append(moe, other, dtype=F32), "abc")
    same_when_forced(moe, drop(moe, "b", dtype=F32), "ac")
    same_when_forced(moe, replace_expert(moe, other, "b", dtype=F32), "ac")


def test_replaced() -> None:
    """The new one is the model's FFN, under its name, for the router's old row."""
    moe, other = made(), dense("new", 9)
    plan = replace_expert(moe, other, "b", dtype=F32)
    assert plan.architecture.experts == ("a", "new", "c")
    assert torch.equal(expert(plan, 1), dense_ffn(other))
    router = f"{LAYER}mlp.router.weight"
    assert torch.equal(tensor(plan, router), tensor(moe, router))
    back = replace_expert(memory(plan, "m"), dense("b", 1), "new", dtype=F32)
    for name in back.targets:
        assert torch.equal(tensor(back, name), tensor(moe, name)), name


def test_a_branch_brings_its_own_expert() -> None:
    moe, branch = made(), trained("code", 5)
    own = f"{LAYER}mlp.experts.0.linear_fc1.weight"
    for plan, place in ((replace_expert(moe, branch, "b", dtype=F32), 1),
                        (append(moe, branch, dtype=F32), 3)):  # fmt: skip
        there = f"{LAYER}mlp.experts.{place}.linear_fc1.weight"
        assert torch.equal(tensor(plan, there), tensor(branch, own))


def test_some_only_is_what_dropping_leaves() -> None:
    moe = made("abcd")
    seen = only(moe, ["d", "a", "b"])
    wanted = drop(moe, "c", dtype=F32)
    assert seen.architecture == wanted.architecture
    for name in wanted.targets:
        assert torch.equal(tensor(seen, name), tensor(wanted, name)), name
    pair = copy(only(moe, ["b", "d"]), dtype=F32)
    twice = drop(memory(drop(moe, "a", dtype=F32), "m"), "c", dtype=F32)
    for name in twice.targets:
        assert torch.equal(tensor(pair, name), tensor(twice, name)), name


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda moe: only(moe, ["a"]), "1 experts would be left"),
        (lambda moe: only(moe, ["a", "z"]), "its experts are a, b, c"),
        (lambda moe: only(dense("a", 1), ["a"]), "none: it is dense"),
        (lambda moe: replace_expert(moe, dense("n", 9), "z", dtype=F64), "its experts are a, b, c"),
        (lambda moe: replace_expert(moe, dense("a", 9), "b", dtype=F64), "has an expert a already"),
        (lambda moe: replace_expert(moe, replace(moe, label="n"), "b", dtype=F64), "an MoE"),
    ],
)
def test_refused(wrong, words: str) -> None:
    with pytest.raises(UserError, match=words):
        wrong(made())


def test_append_then_drop_is_the_moe_again():
    models = [dense(label, i) for i, label in enumerate("abcd")]
    first = memory(btx(models[:3], routing=TOP2, dtype=torch.float32), "moe")
    longer = append(first, models[3], dtype=torch.float32)
    assert longer.architecture.experts == ("a", "b", "c", "d")
    assert torch.equal(expert(longer, 3), dense_ffn(models[3]))
    router = tensor(longer, f"{LAYER}mlp.router.weight")
    assert torch.equal(router[:3], tensor(first, f"{LAYER}mlp.router.weight"))
    assert 0.01 < router[3].std() < 0.03
    again = drop(memory(longer, "longer"), "d", dtype=torch.float32)
    assert again.architecture == first.architecture
    for name in again.targets:
        assert torch.equal(again.evaluate(name), read_whole(first.source, name)), name
    without_b = drop(first, "b", dtype=torch.float32)
    assert torch.equal(expert(without_b, 1), dense_ffn(models[2]))
    rows = tensor(without_b, f"{LAYER}mlp.router.weight")
    assert torch.equal(rows, router[[0, 2]])
    for wrong, found in (
        (lambda: drop(first, "z", dtype=F64), "its experts are a, b, c"),
        (lambda: drop(memory(without_b, "m"), "a", dtype=F64), "1 experts would be left"),
        (lambda: append(models[0], models[1], dtype=F64), "give an MoE"),
        (lambda: append(first, models[1], dtype=F64), "has an expert b already"),
    ):
        with pytest.raises(UserError, match=found):
            wrong()
