"""What a fully sharded trainer writes is read: ``--ckpt-format torch_dcp`` and ``fsdp_dtensor``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.weights.megatron import open_megatron
from tests.megatron_lm import trainer
from tests.megatron_lm.made import (
    LAYOUTS,
    LENGTH,
    TOKENS,
    close,
    convert,
    export,
    losses_of,
    words_for,
)
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)


def saved(
    pool: Ranks, words: list[str], form: str, directory: Path, *more: str
) -> tuple[Path, trainer.Outcome]:
    """What two ranks save after three steps, and what the first saw. They do not begin from a
    checkpoint: no other form can be loaded, and what they draw is as good."""
    at = words.index("--load")
    words = [*words[:at], *words[at + 2 :], "--save", str(directory / "saved"), *more]
    words[words.index("--ckpt-format") + 1] = form
    job = trainer.Job(words, TOKENS, steps=3, forms=(form,))
    outcome = pool.run(trainer.run, 2, job, timeout=600)[0]
    step = directory / "saved" / "iter_0000003"
    assert not (step / "metadata.json").exists()
    assert open_megatron(step, "m").manifest["tokens"] == 3 * 4 * LENGTH
    return step, outcome


def test_what_is_fully_sharded_is_read(written: Any, pool: Ranks, tmp_path: Path) -> None:
    words = words_for(written["llama"][1], 1)
    step, outcome = saved(pool, words, "torch_dcp", tmp_path, "--use-torch-fsdp2")
    export(step, tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcome.after)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_what_megatron_fsdp_saves_is_read(
    name: str, written: Any, pool: Ranks, tmp_path: Path
) -> None:
    """The trainer, when it loads the model that we read, has the losses that it had: bit for bit,
    in bf16, on as many ranks (what experts return is summed in the order of ranks)."""
    more = ["--bf16", *(LAYOUTS["EP2"][2] if name == "mixtral" else ())]
    sharded = shlex.split(
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
        "--no-gradient-reduce-div-fusion"  # gloo has no mean
    )
    words = words_for(written[name][1], 1)
    step, outcome = saved(pool, words, "fsdp_dtensor", tmp_path, *more, *sharded)
    convert(step, tmp_path / "read", "megatron")
    job = trainer.Job([*words_for(tmp_path / "read", 1), *more], TOKENS)
    again = pool.run(trainer.run, 2, job)[0]
    assert torch.equal(again.before, outcome.after)
