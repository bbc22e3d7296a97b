"""What NVIDIA's trainer saved is evaluated as it is, exported with its tokenizer, and taken by a
recipe as its seed and its experts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_btx.data import run_tokenizer
from megatron_btx.data.tokenizer import read_tokenizer
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.recipe.key_reference import model_block
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.megatron import open_megatron
from tests.families import tokenizers_made
from tests.families.made import make
from tests.megatron_lm import trainer
from tests.megatron_lm.made import LENGTH, TOLERANCE, close, convert, export, reference, words_for
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)

TEXT = "jars of quartz"


@dataclass(frozen=True)
class Taken:
    """One start of the trainer, with a tokenizer: two steps from two forms of a checkpoint."""

    saved: dict[str, Path]
    tokens: Tensor
    """``TEXT`` between the tokens that begin and end it."""
    losses: Tensor
    """The trainer's own of those tokens, when it had saved."""
    text: Path


@pytest.fixture(scope="module")
def taken(pool: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Taken:
    """Its arguments are a user's own: they leave the vocabulary to the tokenizer."""
    directory = tmp_path_factory.mktemp("taken")
    tokenizer = read_tokenizer(tokenizers_made.llama3(directory / "hf"), "huggingface")
    make("llama", directory / "hf", vocab_size=tokenizer.vocab_size)
    convert(directory / "hf", directory / "step", "megatron")
    ids = [tokenizer.start_id, *tokenizer.encode([TEXT])[0].tolist(), tokenizer.eos_id]
    (directory / "text.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    words = words_for(directory / "step", 1)
    for name in ("--vocab-size", "--padded-vocab-size"):
        at = words.index(name)
        del words[at : at + 2]
    job = trainer.Job(
        [*words, "--save", str(directory / "torch_dist")],
        torch.tensor([ids]),
        steps=3,
        forms=("torch_dist", "torch"),
    )
    (outcome,) = pool.run(trainer.run, 1, job)
    saved = {form: directory / form / "iter_0000003" for form in job.forms}
    return Taken(saved, job.tokens, outcome.after, directory / "text.jsonl")


def evaluated(directory: Path, text: Path) -> float:
    """What ``btx evaluate`` says, on a rank."""
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate import model_spec
    from megatron_btx.evaluate.loss_on_text import EvalSetting, evaluate_data

    distributed.initialize(Layout(), 0)
    (subject,) = model_spec.parse([str(directory)])
    found = evaluate_data(subject, {"text": [str(text)]}, EvalSetting())
    return float(found["data"]["text"]["nats_per_token"])


@pytest.mark.parametrize("form", ["torch_dist", "torch"])
def test_it_is_evaluated(form: str, taken: Taken, ranks: Ranks) -> None:
    (found,) = ranks.run(evaluated, 1, taken.saved[form], taken.text)
    assert found == pytest.approx(taken.losses.mean().item(), abs=TOLERANCE)


def test_it_is_exported_with_its_tokenizer(taken: Taken, tmp_path: Path) -> None:
    import transformers

    export(taken.saved["torch"], tmp_path / "hf", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT)["input_ids"] == taken.tokens[0, :-1].tolist()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float().eval()
    close(reference(model, taken.tokens), taken.losses)


RECIPE = """
base: {base}
run_dir: {run_dir}
tokenizer: {{vocab_size: {vocab_size}}}
seed: {{from: {seed}}}
experts:
  code: {{from: {expert}}}
{model}
"""


def test_a_recipe_takes_it(taken: Taken, ranks: Ranks, tmp_path: Path) -> None:
    """Its seed is the one form, an expert of it the other; what they leave is ours."""
    hf = taken.text.parent / "step"
    architecture = open_megatron(hf, "m").architecture
    recipe = tmp_path / "recipe.yaml"
    content = RECIPE.format(
        base=Path(__file__).parents[2] / "examples" / "tiny" / "recipe.yaml",
        run_dir=tmp_path / "run",
        vocab_size=architecture.vocab_size,
        seed=taken.saved["torch_dist"],
        expert=taken.saved["torch"],
        model=model_block(architecture.model),
    )
    recipe.write_text(content)
    read = load_recipe(recipe)
    import_checkpoint.check_all(read, graph.outline(read))
    for stage in ("seed", "expert:code"):
        made = (
            tmp_path / "run" / import_checkpoint.link(read, stage, tmp_path / "run")["checkpoint"]
        )
        checkpoint = open_megatron(made, "m")
        assert checkpoint.manifest["tokens"] == 3 * 4 * LENGTH
        assert checkpoint.manifest["tokenizer"]["type"] == "huggingface"
        (found,) = ranks.run(evaluated, 1, made, taken.text)
        assert found == pytest.approx(taken.losses.mean().item(), abs=TOLERANCE)
    comes_along = run_tokenizer._seeds_tokenizer(taken.saved["torch_dist"], None, None)
    assert comes_along.encode([TEXT])[0].tolist() == taken.tokens[0, 1:-1].tolist()
