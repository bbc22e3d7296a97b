"""examples/own_loop.py: a trainer that is not ours, with our spec, router and initializer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_btx.recipe.schema import Layout
from tests.mix.ranks_side import save_dense
from tests.ranks import Ranks

SCRIPT = Path(__file__).parents[2] / "examples/own_loop.py"


def test_two_ranks_mix_four_checkpoints_and_learn(ranks: Ranks, tmp_path: Path) -> None:
    names = ["code", "math", "prose", "seed"]
    for name in names:
        ranks.run(save_dense, 1, tmp_path / name, name, Layout(), "fp32", False, False)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", "2", str(SCRIPT)),
            *(f"{name}={tmp_path / name}" for name in names),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.01
