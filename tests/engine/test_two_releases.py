"""A checkpoint goes on under the other release of Megatron-Core, its optimizer with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.engine.harness import DENSE, MOE, Case
from tests.engine.test_checkpoint import EP2, session
from tests.other_python import other_python, run_module
from tests.ranks import Ranks

CASES = {
    "dense": Case(DENSE),
    "moe": Case(MOE, EP2, "bf16", use_distributed_optimizer=True),
}


def go_on(folder: Path) -> dict[str, list[float]]:
    """The losses of steps 3 and 4 of every case, from its checkpoint of step 2."""
    pool = Ranks(2)
    losses = {
        name: pool.run(session, case.layout.world_size, case, folder / name, 2, 2, False)[0][1]
        for name, case in CASES.items()
    }
    pool.close()
    return losses


def test_training_goes_on_under_the_other_release(ranks: Ranks, tmp_path: Path) -> None:
    python = other_python()
    unstopped = {}
    for name, case in CASES.items():
        world = case.layout.world_size
        (tmp_path / name).mkdir()
        ranks.run(session, world, case, tmp_path / name, None, 2, True)
        unstopped[name] = ranks.run(session, world, case, tmp_path / "no", None, 4, False)[0][1][2:]
    losses = json.loads(run_module(python, "tests.engine.test_two_releases", tmp_path))
    # Two builds of torch may add up in another order.
    assert losses["dense"] == pytest.approx(unstopped["dense"], abs=1e-6)
    assert losses["moe"] == pytest.approx(unstopped["moe"], abs=1e-3)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(go_on(Path(sys.argv[1]))) + "\n")
