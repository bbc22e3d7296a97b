"""``--align-vocab``: models of one tokenizer with more or fewer added tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models

from megatron_btx.data.run_tokenizer import make_tokenizer
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families import open_hf
from megatron_btx.mix.plans import open_sources, plan_of
from megatron_btx.mix.request import MixRequest
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.recipe.load import parse_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.train.train_stage import starting_point
from tests.families.made import make
from tests.mix.commands import btx

pytest.importorskip("transformers")

ADDED = {"code": ["<a>", "<b>", "<c>"], "math": ["<a>"], "seed": ["<a>", "<b>"]}
BASE = [f"w{at}" for at in range(70)]


def tokenizer(directory: Path, added: Sequence[str], base: Sequence[str] = BASE) -> None:
    """Of whole words."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(base)}, base[0]))
    made.add_tokens(list(added))
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": base[1]}))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Three Llamas, each with as many rows as its tokenizer has tokens."""
    root = tmp_path_factory.mktemp("sources")
    for label, added in ADDED.items():
        make("llama", root / label, vocab_size=len(BASE) + len(added))
        tokenizer(root / label, added)
    return root


def words(sources: Path, out: Path) -> list[object]:
    named = [f"{label}={sources / label}" for label in ADDED]
    return ["mix", "--sources", *named, "--align-vocab", "--out", out]


def rows_by_hand(sources: Path, name: str) -> torch.Tensor:
    """The mean of every id's rows, [73, H]; who has none takes the seed's, else code's."""
    stored = {label: load_file(sources / label / "model.safetensors")[name] for label in ADDED}
    means = []
    for at in range(73):
        other = stored["seed"] if at < 72 else stored["code"]
        rows = [own[at] if at < len(own) else other[at] for own in stored.values()]
        means.append(sum(row.double() for row in rows) / 3)
    return torch.stack(means)


def test_missing_rows_are_the_seeds_or_the_first_sources(sources, tmp_path):
    assert btx(*words(sources, tmp_path / "out"), "--method", "average")[0] == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        want = rows_by_hand(sources, name)
        torch.testing.assert_close(made[name].double(), want, rtol=1e-6, atol=0)
    only = load_file(sources / "code" / "model.safetensors")["lm_head.weight"][72]
    assert torch.equal(made["lm_head.weight"][72], only)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 73
    files = [place / "tokenizer.json" for place in (tmp_path / "out", sources / "code")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_a_mixture_is_verified(sources, tmp_path, form):
    code, said = btx(*words(sources, tmp_path / "out"), "--format", form, "--ties", "0.5")
    assert code == 0
    assert "tokenizer: that of code" in said
    code, said = btx("verify", tmp_path / "out")
    assert code == 0, said


def without_maths_tokenizer(sources, folder):
    """The sources once more, by links, that of math without a tokenizer."""
    for label in ADDED:
        (folder / label).mkdir()
        for file in (sources / label).iterdir():
            (folder / label / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "math" / name).unlink()


@pytest.mark.parametrize(
    ("added", "base", "found"),
    [
        (["<x>"], BASE, "its tokenizer and that of code: vocabulary: '<x>' is absent, not 70"),
        (["<a>"], [*BASE[:5], "other", *BASE[6:]], "vocabulary: 'other' is absent, not 5"),
        (None, BASE, "comes without a tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused(sources, tmp_path, added, base, found):
    without_maths_tokenizer(sources, tmp_path)
    if added is not None:
        tokenizer(tmp_path / "math", added, base)
    with pytest.raises(UserError) as caught:
        btx(*words(tmp_path, tmp_path / "out"), "--dry-run")
    assert found in str(caught.value)


RECIPE = """
name: aligned
tokenizer: {{type: huggingface}}
model: {model}
domains: {{web: {{builtin: prose, builtin_bytes: 40_000}}}}
seed: {{from: {sources}/seed}}
experts: {{code: {{from: {sources}/code}}, math: {{from: {sources}/math}}}}
mix: {{align_vocab: {flag}}}
routing: {{type: topk, moe_router_topk: 2}}
finetune: {{tokens: 4096, data: {{web: 1}}, global_batch_size: 8}}
training: {{micro_batch_size: 8, precision: fp32}}
evaluate: {{tokens: 64}}
"""


def recipe_of(sources: Path, place: Path, flag: str = "true") -> Recipe:
    seed = open_hf(sources / "seed", "seed").architecture.model
    stated = {name: value for name, value in asdict(seed).items() if value is not None}
    text = RECIPE.format(model=json.dumps(stated), sources=sources, flag=flag)
    return parse_recipe(text, place / "recipe.yaml")


def test_a_recipe_takes_them_too(sources, tmp_path):
    """Each model gets the rows where it is taken; the mix is that of the command."""
    recipe = recipe_of(sources, tmp_path)
    assert recipe.tokenizer.vocab_size == 73
    stages = graph.build(recipe)
    import_checkpoint.check_all(recipe, stages)
    run_dir = tmp_path / "run"
    for stage in stages:
        if stage.kind == "import":
            import_checkpoint.link(recipe, stage.name, run_dir)
    assert (run_dir / "expert-code" / "checkpoints" / "step_00000000").is_dir()
    plan = starting_point(recipe, "finetune", recipe.finetune, run_dir, look=True)
    asked = MixRequest(
        sources=tuple(f"{label}={sources / label}" for label in ADDED),
        align_vocab=True,
        random_seed=recipe.random_seed,
    )
    request, models = open_sources(asked)
    want = plan_of(request, models)
    assert plan.architecture == want.architecture
    assert plan.targets.keys() == want.targets.keys()
    for name, target in plan.targets.items():
        assert torch.equal(plan.evaluate(name), want.evaluate(name)), name
        assert target.dtype == torch.float32
    made = make_tokenizer(recipe, {}, run_dir / "tokenizer", lambda *_: None)
    assert made.vocab_size == 73
    assert btx("verify", run_dir / "seed" / "checkpoints" / "step_00000000")[0] == 0
    keys = {
        flag: {s.name: s.key for s in graph.build(recipe_of(sources, tmp_path, flag))}
        for flag in ("true", "false")
    }
    assert all(keys["true"][name] != keys["false"][name] for name in ("seed", "expert:code"))


def test_a_recipe_without_the_key_refuses_them(sources, tmp_path):
    recipe = recipe_of(sources, tmp_path, "false")
    with pytest.raises(UserError, match="another tokenizer than"):
        import_checkpoint.check_all(recipe, graph.build(recipe))


def test_a_recipe_refuses_other_tokenizers(sources, tmp_path):
    without_maths_tokenizer(sources, tmp_path)
    tokenizer(tmp_path / "math", ["<x>"])
    recipe = recipe_of(tmp_path, tmp_path)
    with pytest.raises(UserError, match="mix.align_vocab: math: its tokenizer and that of code"):
        import_checkpoint.check_all(recipe, graph.build(recipe))


def test_without_the_flag_it_is_refused_as_ever(sources, tmp_path):
    asked = [word for word in words(sources, tmp_path / "out") if word != "--align-vocab"]
    with pytest.raises(UserErrors, match="vocab_size is 71, that of code is 73") as caught:
        btx(*asked, "--dry-run")
    about = [error for error in caught.value.errors if "vocab" in error.what]
    assert about
    assert all("--align-vocab" in error.fix for error in about), "the way that leads on"
