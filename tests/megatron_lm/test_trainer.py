"""NVIDIA's trainer loads what we write, by the arguments that we print, and we read what it saves.

Nothing is lenient: its loader fails on a name that it looks for and a checkpoint lacks.
"""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.mix import offline
from megatron_btx.mix.request import Request
from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.megatron import open_megatron, second_names
from megatron_btx.weights.source import read_whole
from tests.families.made import make
from tests.megatron_lm import trainer
from tests.ranks import RankError, Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)

TOOLS = Path(__file__).parents[2] / "tools" / "convert"
LENGTH, VOCABULARY = 24, 70
TOKENS = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5
"""Nats a token, fp32: seen are 1e-6, of sums in another order."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Ranks of its own: the trainer leaves much behind in a process."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def convert(source: Path, out: Path, form: str) -> None:
    request = Request(sources=(f"model={source}",), out=str(out), method="copy", format=form)
    offline.run(request, io.StringIO())


def words_for(step: Path, tp: int) -> list[str]:
    """What the tool prints for a step directory, and the directory that it says to make."""
    if str(TOOLS) not in sys.path:
        sys.path.insert(0, str(TOOLS))
    import megatron_lm_args

    checkpoint = open_megatron(step, "model")
    words = [
        word
        for name, value in megatron_lm_args.arguments(checkpoint, tp)
        for word in (f"--{name}", *shlex.split(str(value)))
    ]
    load = step.parent / f"{step.name}.load"
    if not load.is_dir():
        load.mkdir()
        (load / "release").symlink_to(step)
        (load / "latest_checkpointed_iteration.txt").write_text("release\n")
    words[words.index("--load") + 1] = str(load)
    words[words.index("--seq-length") + 1] = str(LENGTH)
    return [*words, "--tokenizer-type", "NullTokenizer"]


def by_hand(step: Path) -> dict[str, Any]:
    """What the tool says to set by hand."""
    model = open_megatron(step, "model").architecture.model
    return {"rope_scaling_factor": model.rope_scaling_factor} if model.rope_scaling else {}


def reference(model: Any) -> Tensor:
    """``transformers``' loss of every token."""
    with torch.no_grad():
        logits = model(TOKENS[:, :-1]).logits.float()
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="none"
    )
    return flat.view(2, LENGTH)


def losses_of(directory: Path) -> Tensor:
    """``transformers``' losses of a directory of Hugging Face's."""
    import transformers

    return reference(transformers.AutoModelForCausalLM.from_pretrained(directory).float().eval())


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


LAYOUTS: dict[str, tuple[int, int, tuple[str, ...]]] = {  # ranks, TP, more arguments
    "one rank": (1, 1, ()),
    "TP2": (2, 2, ()),
    "EP2": (2, 1, ("--expert-model-parallel-size", "2")),
    "TP2 x EP2": (4, 2, ("--expert-model-parallel-size", "2")),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Path]]:
    """Name -> ``transformers``' model and our Megatron directory of it."""
    found = {}
    for name in ("llama", "llama 3.2, tied", "qwen3", "mixtral"):
        directory = tmp_path_factory.mktemp("written")
        model = make(name, directory / "hf")
        convert(directory / "hf", directory / "step", "megatron")
        found[name] = (model, directory / "step")
    return found


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The same of a mix by `btx mix`: the losses of its Hugging Face form, and its directory."""
    directory = tmp_path_factory.mktemp("mixed")
    make("llama", directory / "a")
    model = make("llama", directory / "b")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(directory / "b")
    sources = tuple(f"{label}={directory / label}" for label in "ab")
    for form in ("hf", "megatron"):
        out = str(directory / form)
        offline.run(Request(sources=sources, out=out, format=form), io.StringIO())
    return losses_of(directory / "hf"), directory / "megatron"


@pytest.mark.parametrize("layout", ["one rank", "TP2"])
@pytest.mark.parametrize("name", ["llama", "llama 3.2, tied", "qwen3"])
def test_it_loads_a_dense_model(name: str, layout: str, written: Any, pool: Ranks) -> None:
    model, step = written[name]
    world, tp, more = LAYOUTS[layout]
    job = trainer.Job([*words_for(step, tp), *more], TOKENS, by_hand=by_hand(step))
    for outcome in pool.run(trainer.run, world, job):
        close(outcome.before, reference(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_loads_a_mix(layout: str, mixed: Any, pool: Ranks) -> None:
    expected, step = mixed
    world, tp, more = LAYOUTS[layout]
    for outcome in pool.run(trainer.run, world, trainer.Job([*words_for(step, tp), *more], TOKENS)):
        close(outcome.before[: len(expected)], expected)


def test_without_the_factor_by_hand_it_computes_another_model(written: Any, pool: Ranks) -> None:
    """The note that the tool prints is needed: where it no longer is, drop it."""
    model, step = written["llama 3.2, tied"]
    (outcome,) = pool.run(trainer.run, 1, trainer.Job(words_for(step, 1), TOKENS))
    assert float((outcome.before - reference(model)).abs().max()) > 10 * TOLERANCE


def test_a_name_that_is_not_there_is_an_error_of_its_own(
    mixed: Any, pool: Ranks, tmp_path: Path
) -> None:
    import pickle

    _, step = mixed
    (tmp_path / "step").mkdir()
    for file in step.iterdir():
        (tmp_path / "step" / file.name).symlink_to(file)
    metadata = pickle.loads((step / ".metadata").read_bytes())  # ours
    (second,) = second_names(open_megatron(step, "m").architecture).values()
    del metadata.state_dict_metadata[second]
    (tmp_path / "step" / ".metadata").unlink()
    (tmp_path / "step" / ".metadata").write_bytes(pickle.dumps(metadata))
    job = trainer.Job(words_for(tmp_path / "step", 1), TOKENS)
    with pytest.raises(RankError, match=second):
        pool.run(trainer.run, 1, job)


def trained(
    pool: Ranks, step: Path, layout: str, save: Path, *more: str, older_form: bool = False
) -> trainer.Outcome:
    """Three steps of its training, saved; what the first rank saw."""
    world, tp, words = LAYOUTS[layout]
    words = (*words_for(step, tp), *words, "--save", str(save), *more)
    job = trainer.Job(words, TOKENS, steps=3, older_form=older_form, by_hand=by_hand(step))
    outcome = pool.run(trainer.run, world, job)[0]
    assert outcome.losses[0] > outcome.losses[-1], "it learned nothing"
    assert (save / "iter_0000003").is_dir()
    return outcome


@pytest.mark.parametrize(
    ("name", "layout", "more"),
    [
        ("llama", "one rank", ()),
        ("qwen3", "TP2", ("--use-distributed-optimizer",)),
        ("llama 3.2, tied", "one rank", ("--use-distributed-optimizer",)),
    ],
)
def test_what_it_trained_is_read(
    name: str, layout: str, more: tuple[str, ...], written: Any, pool: Ranks, tmp_path: Path
) -> None:
    outcome = trained(pool, written[name][1], layout, tmp_path / "saved", *more)
    step = tmp_path / "saved" / "iter_0000003"
    given = by_hand(written[name][1])
    if given:  # its arguments say 32, and without a hand's help it computes with 8
        with pytest.raises(UserError, match="drops for 8"):
            open_megatron(step, "m")
    found = open_megatron(step, "m", given)
    assert found.manifest["tokens"] == 3 * 4 * LENGTH
    export(step, tmp_path / "hf", given)
    close(losses_of(tmp_path / "hf"), outcome.after)


@pytest.mark.parametrize("layout", ["one rank", "EP2"])
def test_a_mix_that_it_trained_is_read(
    layout: str, mixed: Any, pool: Ranks, tmp_path: Path
) -> None:
    outcome = trained(pool, mixed[1], layout, tmp_path / "saved")
    export(tmp_path / "saved" / "iter_0000003", tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcome.after)


def export(step: Path, out: Path, given: dict[str, Any]) -> None:
    """What its directory does not say is given, as by a file of options."""
    request = Request(sources=(f"model={step}",), out=str(out), method="copy", model=given)
    offline.run(request, io.StringIO())


def test_its_checkpoints_are_mixed_and_evaluated(
    written: Any, pool: Ranks, ranks: Ranks, tmp_path: Path
) -> None:
    """Two models that it trained become experts; one of them is trained on by us."""
    outcome = trained(pool, written["llama"][1], "one rank", tmp_path / "a")
    steps = [tmp_path / "a" / "iter_0000003", written["llama"][1]]
    sources = tuple(f"{label}={step}" for label, step in zip("ab", steps, strict=True))
    request = Request(sources=sources, out=str(tmp_path / "moe"), format="megatron")
    offline.run(request, io.StringIO())
    moe, expert = open_megatron(tmp_path / "moe", "m"), open_megatron(steps[0], "m")
    name = "decoder.layers.1.mlp.{}linear_fc2.weight"
    assert torch.equal(
        read_whole(moe.source, name.format("experts.0.")),
        read_whole(expert.source, name.format("")),
    )
    (losses,) = ranks.run(our_losses, 1, steps[0])
    close(losses, outcome.after)


def our_losses(directory: Path) -> Tensor:
    """Of every token, by our model, which Megatron's own loader fills."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from megatron_btx.weights.manifest import read_manifest

    distributed.initialize(Layout(), 0)
    model = build_model(read_manifest(directory)[0], Layout(), "fp32")
    checkpoint.load(directory, checkpoint.TrainingState(model=model))
    inputs, labels = TOKENS[:, :-1].contiguous(), TOKENS[:, 1:].contiguous()
    positions = torch.arange(LENGTH).expand_as(inputs).contiguous()
    return model(inputs, positions, None, labels=labels).detach()


def same(found: Path, expected: Path, given: dict[str, Any]) -> None:
    """Both directories hold one model, bit for bit."""
    models = [open_megatron(found, "m", given), open_megatron(expected, "m")]
    assert models[0].tensors.keys() == models[1].tensors.keys()
    for name in models[1].tensors:
        assert torch.equal(*(read_whole(model.source, name) for model in models)), name


OLD_FORMS = {  # model, ranks, TP, more arguments, one of the files
    "TP1": ("llama", 1, 1, (), "mp_rank_00"),
    "TP2": ("qwen3", 2, 2, (), "mp_rank_01"),
    "PP2, tied": (
        "llama 3.2, tied", 2, 1, ("--pipeline-model-parallel-size", "2"), "mp_rank_00_001"
    ),
    "TP2 x PP2": ("llama", 4, 2, ("--pipeline-model-parallel-size", "2"), "mp_rank_01_001"),
    "EP2": ("mixtral", 2, 1, ("--expert-model-parallel-size", "2"), "mp_rank_00_001"),
    "TP2 x EP2": ("mixtral", 4, 2, ("--expert-model-parallel-size", "2"), "mp_rank_01_001"),
}  # fmt: skip


@pytest.mark.parametrize("form", OLD_FORMS)
def test_the_older_form_is_read(form: str, written: Any, pool: Ranks, tmp_path: Path) -> None:
    name, world, tp, more, file = OLD_FORMS[form]
    step = written[name][1]
    words = (*words_for(step, tp), *more, "--save", str(tmp_path))
    job = trainer.Job(words, TOKENS, older_form=True, compute=False, by_hand=by_hand(step))
    pool.run(trainer.run, world, job)
    saved = tmp_path / "iter_0000000"
    assert (saved / file / "model_optim_rng.pt").is_file()
    same(saved, step, by_hand(step))
    released = saved.rename(tmp_path / "release")
    same(released, step, by_hand(step))
    (released / file / "model_optim_rng.pt").unlink()
    with pytest.raises(UserError):
        open_megatron(released, "m", by_hand(step))


def test_the_older_form_with_its_optimizer(written: Any, pool: Ranks, tmp_path: Path) -> None:
    distributed = "--use-distributed-optimizer"
    llama = written["llama"][1]
    outcome = trained(pool, llama, "TP2", tmp_path / "saved", distributed, older_form=True)
    step = tmp_path / "saved" / "iter_0000003"
    assert (step / "mp_rank_00" / "distrib_optim.pt").is_file()
    export(step, tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcome.after)
