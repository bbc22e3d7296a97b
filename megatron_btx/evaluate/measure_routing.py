"""Where an MoE sends the tokens of any text: for each layer, text and expert the share of the
choices and the mean gate (arXiv 2403.07816, section 4.3.2 and figures 3 to 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_btx.data.heldout_sequences import Sample, held_out
from megatron_btx.errors import UserError
from megatron_btx.evaluate.heldout_loss import check_finite, evaluate
from megatron_btx.evaluate.loss_on_text import EvalSetting, packed, whole_sequences
from megatron_btx.evaluate.model_spec import Subject, run_of
from megatron_btx.evaluate.models import load, opened
from megatron_btx.evaluate.predictor import NO_PROGRESS
from megatron_btx.evaluate.routing_stats import expert_choice
from megatron_btx.recipe.load import load_recipe


def measure(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    setting: EvalSetting,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> dict[str, Any]:
    """The routing of a checkpoint. Every rank calls it.

    Args:
        subject: an MoE.
        data: by name, JSONL files; whole sequences of them count. None: the held-out text of the
            run that the checkpoint is of.
        setting: how.
        progress: told how much is done.

    Returns:
        ``{"experts": names, "load": {text: [[share] by layer]}, "gate": likewise,
        "expert_choice": of Sample Top-1}``.

    Raises:
        UserError: it has no experts, a text is too short, or it computes NaN or infinity.
    """
    (checkpoint,) = opened(subject, setting.tokenizer).values()
    architecture = checkpoint.architecture
    if not architecture.experts:
        raise UserError(subject.name, "is a dense model: it routes nothing", "give an MoE")
    texts: Mapping[str, Sequence[Sample]]
    if data:
        given = packed(subject, data, setting, {"model": checkpoint})
        texts = {name: whole_sequences(name, text) for name, text in given.items()}
    else:
        texts = _held_out(subject, setting)
    live = load(checkpoint, setting.layout, setting.precision, setting.random_seed)
    result: dict[str, Any] = {
        "experts": list(architecture.experts),
        "expert_choice": expert_choice(architecture.routing),
        "load": {},
        "gate": {},
    }
    for number, (name, text) in enumerate(texts.items(), 1):
        found = evaluate(live.module, {name: text}, micro_batch_size=setting.micro_batch_size)
        check_finite(subject.name, found)
        assert found.load is not None
        assert found.gate is not None
        result["load"] |= found.load
        result["gate"] |= found.gate
        progress(number / len(texts))
    return result


def _held_out(subject: Subject, setting: EvalSetting) -> Mapping[str, Sequence[Sample]]:
    """The run's, as its own evaluation reads it.

    Raises:
        UserError: the checkpoint is of no run, or other sequences are asked for.
    """
    run_dir = run_of(subject.first)
    if run_dir is None:
        fix = "give text to measure it on: --data NAME=FILE"
        what = "lies in no run's directory, so there is no held-out text to measure it on"
        raise UserError(subject.name, what, fix)
    if setting.seq_length is not None:
        raise UserError("--seq-length", "is the run's own here", "leave it out, or give --data")
    recipe = load_recipe(run_dir / "recipe.yaml")
    return held_out(recipe, run_dir, tokens=setting.tokens or recipe.evaluate.tokens)
