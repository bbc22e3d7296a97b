"""What the tests of NVIDIA's trainer share: its arguments for a directory of ours, and losses."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_btx.families import write_megatron_lm_args
from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from megatron_btx.weights.megatron import open_megatron
from tests.megatron_lm import trainer
from tests.ranks import Ranks

LENGTH, VOCABULARY = 24, 70
TOKENS = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5
"""Nats a token, fp32: seen are 1e-6, of sums in another order."""


def convert(source: Path, out: Path, form: str) -> None:
    request = MixRequest(sources=(f"model={source}",), out=str(out), method="copy", format=form)
    offline.run(request, io.StringIO())


def words_for(step: Path, tp: int) -> list[str]:
    """What the tool prints for a step directory, and the directory that it says to make."""
    checkpoint = open_megatron(step, "model")
    words = [
        word
        for name, value in write_megatron_lm_args.arguments(checkpoint, tp)
        for word in (f"--{name}", *shlex.split(str(value)))
    ]
    load = step.parent / f"{step.name}.load"
    if not load.is_dir():
        load.mkdir()
        (load / "release").symlink_to(step)
        (load / "latest_checkpointed_iteration.txt").write_text("release\n")
    words[words.index("--load") + 1] = str(load)
    words[words.index("--seq-length") + 1] = str(LENGTH)
    if "--tokenizer-type" not in words:
        words += ["--tokenizer-type", "NullTokenizer"]
    return words


def by_hand(step: Path) -> dict[str, Any]:
    """What the tool says to set by hand."""
    model = open_megatron(step, "model").architecture.model
    return {"rope_scaling_factor": model.rope_scaling_factor} if model.rope_scaling else {}


def reference(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """``transformers``' loss of every token."""
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits.float()
    flat = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return flat.view(len(tokens), -1)


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


def trained(
    pool: Ranks,
    step: Path,
    layout: str,
    save: Path,
    *more: str,
    forms: Sequence[str] = ("torch_dist",),
) -> trainer.Outcome:
    """Three steps of its training, saved; what the first rank saw."""
    world, tp, words = LAYOUTS[layout]
    words = (*words_for(step, tp), *words, "--save", str(save), *more)
    job = trainer.Job(words, TOKENS, steps=3, forms=forms, by_hand=by_hand(step))
    outcome = pool.run(trainer.run, world, job)[0]
    assert outcome.losses[0] > outcome.losses[-1], "it learned nothing"
    assert (save / "iter_0000003").is_dir()
    return outcome


def export(step: Path, out: Path, given: dict[str, Any]) -> None:
    """What its directory does not say is given, as by a file of options."""
    request = MixRequest(sources=(f"model={step}",), out=str(out), method="copy", model=given)
    offline.run(request, io.StringIO())
