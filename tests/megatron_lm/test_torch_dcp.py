"""``--ckpt-format torch_dcp``: what a fully sharded trainer writes is read. (Megatron-FSDP, which
writes ``fsdp_dtensor``, reduces by what gloo has not: tests/weights/test_torch_dcp.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_btx.weights.megatron import open_megatron
from tests.megatron_lm import trainer
from tests.megatron_lm.made import LENGTH, TOKENS, close, export, losses_of, words_for
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(not trainer.HERE, reason=trainer.WHY)


def test_what_is_fully_sharded_is_read(written: Any, pool: Ranks, tmp_path: Path) -> None:
    words = words_for(written["llama"][1], 1)
    words[words.index("--ckpt-format") + 1] = "torch_dcp"
    # It does not begin from another form: what it draws is as good.
    del words[words.index("--load") : words.index("--load") + 2]
    words += ["--use-torch-fsdp2", "--save", str(tmp_path / "saved")]
    job = trainer.Job(words, TOKENS, steps=3, forms=("torch_dcp",))
    outcomes = pool.run(trainer.run, 2, job, timeout=600)
    saved = tmp_path / "saved" / "iter_0000003"
    assert not (saved / "metadata.json").exists()
    assert open_megatron(saved, "m").manifest["tokens"] == 3 * 4 * LENGTH
    export(saved, tmp_path / "hf", {})
    close(losses_of(tmp_path / "hf"), outcomes[0].after)
