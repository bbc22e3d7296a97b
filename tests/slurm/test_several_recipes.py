"""Three systems under two random seeds as one graph, on a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import LO, ROOT, TINY, sums

SYSTEMS = {"dense": "dense", "ensemble": "btm", "mixture": "btx"}
"""Name -> system; the mixture's has the dense baseline as well."""


def written(path: Path, files: str) -> Path:
    """Documents of text that is here."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(ROOT.glob(files))]
    documents = [text[at : at + 200] for text in texts for at in range(0, len(text), 200)]
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    return path


def test_what_three_systems_share_is_made_once(cluster: Cluster, tmp_path: Path) -> None:
    recipes = tmp_path / "systems"
    recipes.mkdir()
    sources = {"general": "docs/*.md", "code": "megatron_btx/engine/*.py", "prose": "*.md"}
    train = {name: written(tmp_path / f"{name}.jsonl", files) for name, files in sources.items()}
    train["math"] = sums(tmp_path / "math.jsonl")
    domains = {name: {"builtin": None, "train": str(path)} for name, path in train.items()}
    text = f"{LO}domains: {json.dumps(domains)}\nexport: {{format: none}}\n"
    (tmp_path / "base.yaml").write_text(f"base: {TINY}\n{text}")
    for name, system in SYSTEMS.items():
        own = f"base: {TINY}\nname: {name}\nsystem: {system}\nrun_dir: {tmp_path}/runs/{name}\n"
        (recipes / f"{name}.yaml").write_text(own)
    these = ("systems", "--base", "base.yaml", "--seeds", "2")

    def btx(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "megatron_btx.cli", *words],
            env={**cluster.environment, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def queued() -> list[str]:
        names = cluster("squeue", "-h", "-a", "-o", "%j").split()
        return [name.partition("@")[0] for name in names if not name.startswith("evaluate")]

    btx("submit", *these)
    one = [*("dense", "expert:code", "expert:math", "expert:prose", "finetune", "mix", "prepare")]
    one += [*("report", "report", "report", "seed")]
    found = Counter(queued())
    assert found <= Counter([*one, *one, "compare"]), "nothing twice; what is done is gone"
    assert (found["report"], found["compare"]) == (6, 1)
    said = btx("cancel", *these)
    for what in ("(compare)", "(report of dense)", "(finetune of mixture)"):
        assert what in said
    wait(lambda: not cluster.queue(), "the jobs to be cancelled")
    assert btx("cancel", *these) == "no jobs in the queue\n"

    btx("submit", *these)
    wait(lambda: not cluster.queue(), "the comparison to end", 1200)
    runs = tmp_path / "runs"
    out = [f"{path}:\n{path.read_text()}" for path in runs.rglob("*.out")]
    assert (runs / "compare.json").exists(), "\n".join(out)
    said = (runs / "slurm" / "compare.out").read_text()
    compared = json.loads((runs / "compare.json").read_text())
    assert set(SYSTEMS) | {"seed"} <= set(compared["systems"]), said
    assert (runs / "compare.html").exists()
    seeds = {path.name.rpartition("-")[2] for path in runs.glob("dense-*")}
    assert len(seeds) == 1
    for more in ("", f"-{seeds.pop()}"):
        for stage in ("prepare", "seed"):
            places = {(runs / f"{name}{more}" / stage).resolve() for name in SYSTEMS}
            assert len(places) == 1, stage
    content = json.loads(btx("status", *these, "--json"))
    states = {
        (Path(place).name, row["stage"]): row["state"]
        for place, rows in content.items()
        for row in rows
    }
    assert states["runs", "compare"] == "done"
    assert set(states.values()) == {"done"}, states
    assert f"comparison, in {runs}" in btx("status", *these)
