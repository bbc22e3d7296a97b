"""The controller and the node daemons killed at moments drawn at random, while the whole graph
runs: it ends the same bit for bit, or ``btx status`` says what a person must do.

Each draw takes minutes: they run with ``BTX_TEST_SLURM=long``; ``BTX_TEST_SEED`` draws others.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import NODES, Run, branch

SEED = int(os.environ.get("BTX_TEST_SEED", "0"))
DRAWS = 3
KILLS = 5
"""Of the controller, and as many of node daemons."""
TRAINED = ("seed", "expert-code", "expert-math", "expert-prose", "finetune", "dense")


@pytest.mark.skipif(os.environ.get("BTX_TEST_SLURM") != "long", reason="BTX_TEST_SLURM=long")
@pytest.mark.parametrize("seed", range(SEED, SEED + DRAWS))
def test_daemons_killed_at_random(whole: Run, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    victims = ["controller"] * KILLS + draw.choices(["n1", "n2"], k=KILLS)
    draw.shuffle(victims)
    text = NODES + "wandb: {mode: offline}\n"
    said = []
    with Cluster(tmp_path / "cluster", nodes=2) as cluster:
        run = branch(whole, tmp_path / "run", text, "prepare", cluster=cluster)
        run.submit()
        began = time.monotonic()
        for victim in victims:
            time.sleep(draw.uniform(0.2, 6))
            cluster.kill(victim)
            down = draw.uniform(0.2, 6)
            said.append(f"{time.monotonic() - began:.1f} s: {victim} killed, for {down:.1f} s")
            time.sleep(down)
            if victim == "controller":
                cluster.start_controller()
            else:
                cluster.start_node(victim)
        wait(lambda: _answers(run), "the controller")
        wait(lambda: _driven_to_its_end(run, said), f"the run to end: {said}")
    for stage in TRAINED:
        assert run.steps(stage) == whole.steps(stage), (stage, said, run.out())
    sys.stdout.write("\n".join(said) + "\n")


def _driven_to_its_end(run: Run, said: list[str]) -> bool:
    """Do what ``btx status`` says that a person must do; whether all is done."""
    rows = run.status()
    for row in rows.values():
        told = re.search(r"`scontrol (requeue|release) (\d+)`", row["note"])
        if told is not None:
            said.append(row["note"])
            run.cluster("scontrol", told[1], told[2])
    left = {name: row for name, row in rows.items() if row["state"] != "done"}
    if left and not any(row["active"] for row in rows.values()):
        said.append(f"submitted again: {json.dumps(left, indent=1)}")
        assert all(row["note"] for row in left.values()), said
        run.btx("submit")  # refused while a job is still completing
    return not left and not run.queue()


def _answers(run: Run) -> bool:
    return run.btx("status").returncode == 0
