"""NVIDIA's trainer loads what we write, by the arguments that we print, and we read what it saves.

Nothing is lenient: its loader fails on a name that it looks for and a checkpoint lacks.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.families.write_megatron_lm_args import check_names
from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.megatron import open_megatron, second_names
from megatron_btx.weights.source import read_whole
from tests.megatron_lm import trainer
from tests.megatron_lm.made import (
    LAYOUTS,
    LENGTH,
    TOKENS,
    TOLERANCE,
    by_hand,
    close,
    convert,
    export,
    losses_of,
    reference,
    trained,
    words_for,
)
from tests.ranks import RankError, Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)


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


def test_a_directory_of_an_older_version_is_written_again(
    mixed: Any, pool: Ranks, tmp_path: Path
) -> None:
    """It lacks the names that we did not know of: an error on its side, a line on ours."""
    import pickle

    expected, step = mixed
    old = tmp_path / "step"
    old.mkdir()
    for file in step.iterdir():
        if file.name != "hashes.json":  # it has those of what is changed below
            (old / file.name).symlink_to(file)
    metadata = pickle.loads((step / ".metadata").read_bytes())  # ours
    (second,) = second_names(open_megatron(step, "m").architecture).values()
    for name in list(metadata.state_dict_metadata):
        if name == second or "._extra_state/" in name:
            del metadata.state_dict_metadata[name]
    (old / ".metadata").unlink()
    (old / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        UserError, match=r"lacks decoder\.final_layernorm\._extra_state and \d+ more"
    ):
        check_names(old, open_megatron(old, "m").architecture)
    convert(old, tmp_path / "new", "megatron")
    check_names(tmp_path / "new", open_megatron(old, "m").architecture)
    (outcome,) = pool.run(trainer.run, 1, trainer.Job(words_for(tmp_path / "new", 1), TOKENS))
    close(outcome.before[: len(expected)], expected)
    with pytest.raises(RankError, match=second):  # last: it ends the ranks
        pool.run(trainer.run, 1, trainer.Job(words_for(old, 1), TOKENS))


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


def test_its_checkpoints_are_mixed_and_evaluated(
    written: Any, pool: Ranks, ranks: Ranks, tmp_path: Path
) -> None:
    """Two models that it trained become experts; one of them is trained on by us."""
    outcome = trained(pool, written["llama"][1], "one rank", tmp_path / "a")
    steps = [tmp_path / "a" / "iter_0000003", written["llama"][1]]
    sources = tuple(f"{label}={step}" for label, step in zip("ab", steps, strict=True))
    request = MixRequest(sources=sources, out=str(tmp_path / "moe"), format="megatron")
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


VIRTUAL = shlex.split("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1")


def saved_again(
    pool: Ranks, world: int, words: Sequence[str], step: Path, save: Path, *forms: str
) -> Path:
    """Our directory, loaded and saved by the trainer without a step between."""
    words = (*words, "--save", str(save / forms[0]))
    job = trainer.Job(words, TOKENS, forms=forms, compute=False, by_hand=by_hand(step))
    pool.run(trainer.run, world, job, timeout=600)
    return save / forms[0] / "iter_0000000"


@pytest.mark.parametrize("name", ["llama 3.2, tied", "mixtral"])
def test_virtual_pipeline_stages_are_read(
    name: str, written: Any, pool: Ranks, tmp_path: Path
) -> None:
    """Four layers on two ranks, each of which has the first and third, or second and fourth."""
    step = written[name][1]
    world, more = (4, LAYOUTS["EP2"][2]) if name == "mixtral" else (2, ())
    words = [*words_for(step, 1), *VIRTUAL, *more]
    saved = saved_again(pool, world, words, step, tmp_path, "torch_dist", "torch")
    same(saved, step, by_hand(step))
    same(tmp_path / "torch" / saved.name, step, by_hand(step))


@pytest.mark.parametrize("form", OLD_FORMS)
def test_the_older_form_is_read(form: str, written: Any, pool: Ranks, tmp_path: Path) -> None:
    name, world, tp, more, file = OLD_FORMS[form]
    step = written[name][1]
    saved = saved_again(pool, world, [*words_for(step, tp), *more], step, tmp_path, "torch")
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
    outcome = trained(pool, llama, "TP2", tmp_path / "saved", distributed, forms=("torch",))
    step = tmp_path / "saved" / "iter_0000003"
    assert (step / "mp_rank_00" / "distrib_optim.pt").is_file()
    export(step, tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcome.after)
