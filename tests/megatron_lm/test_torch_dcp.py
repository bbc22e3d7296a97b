"""``--ckpt-format torch_dcp`` and ``fsdp_dtensor``: what fully sharded trainers write is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_btx.weights.megatron import open_megatron
from tests.megatron_lm import trainer
from tests.megatron_lm.made import LENGTH, TOKENS, close, export, losses_of, words_for
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)

FORMS = {
    "torch_dcp": ("llama", ("--use-torch-fsdp2",)),
    "fsdp_dtensor": (
        "llama",
        ("--use-megatron-fsdp", "--data-parallel-sharding-strategy", "optim_grads_params"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_fully_sharded_is_read(
    form: str, written: Any, pool: Ranks, tmp_path: Path
) -> None:
    if form == "fsdp_dtensor":
        pytest.importorskip("einops", reason="Megatron-FSDP needs einops")
    name, more = FORMS[form]
    words = words_for(written[name][1], 1)
    words[words.index("--ckpt-format") + 1] = form
    # Neither begins from another form: what they draw is as good.
    del words[words.index("--load") : words.index("--load") + 2]
    job = trainer.Job(
        [*words, *more, "--save", str(tmp_path / form)], TOKENS, steps=3, forms=(form,)
    )
    outcomes = pool.run(trainer.run, 2, job)
    step = tmp_path / form / "iter_0000003"
    assert not (step / "metadata.json").exists()
    assert open_megatron(step, "m").manifest["tokens"] == 3 * 4 * LENGTH
    export(step, tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcomes[0].after)
