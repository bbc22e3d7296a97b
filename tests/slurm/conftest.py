"""The cluster, and runs of the tiny recipe on it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_btx.train.metrics import read
from tests.slurm.cluster import Cluster, missing, wait

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
LO = "slurm: {environment: {GLOO_SOCKET_IFNAME: lo}}\n"
MATH = "domains: {{math: {{builtin: null, train: {}}}}}\n"
SECRET = "0123456789abcdef" * 2 + "01234567"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Five minutes of their own: they run where they are asked for."""
    if os.environ.get("BTX_TEST_SLURM"):
        return
    reason = missing() or "a real Slurm is started by `make test-slurm`"
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes for all tests."""
    problem = missing()
    assert not problem, problem
    with Cluster(tmp_path_factory.mktemp("cluster") / "it") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test no job and no process of one."""
    yield
    if "cluster" in request.fixturenames:
        cluster = request.getfixturevalue("cluster")
        if "side_by_side" in request.fixturenames:
            return  # each looks after itself
        queue = [line for line in cluster.queue() if not line.endswith("COMPLETING")]
        cluster.clear()
        assert not queue
        wait(lambda: not cluster.processes(), "the last process to end")


class Run:
    """A recipe over the tiny one in a directory of its own."""

    def __init__(self, cluster: Cluster, directory: Path, text: str = "") -> None:
        self.cluster, self.directory = cluster, directory
        self.run_dir = directory / "run"
        self.recipe = directory / "recipe.yaml"
        directory.mkdir(exist_ok=True)
        self.write(text)

    def write(self, text: str) -> None:
        """The recipe: tiny, with mathematics of its own, and this."""
        text = f"{text}\n"
        text += "" if "slurm:" in text else LO
        text += "" if "domains:" in text else MATH.format(sums(self.cluster.top / "sums.jsonl"))
        self.recipe.write_text(f"base: {TINY}\nrun_dir: {self.run_dir}\n{text}")

    @property
    def environment(self) -> dict[str, str]:
        """The one in which commands run."""
        return {**self.cluster.environment, "PYTHONPATH": str(ROOT)}

    def btx(
        self, *words: str, user: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A command of btx's on this recipe; ``user``: words that run it as another one."""
        return subprocess.run(
            [*user, *self._command(*words)],
            env={**self.environment, **environment},
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def start(self, *words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """One that goes on."""
        return subprocess.Popen(
            self._command(*words), env=self.environment, stdout=stdout, stderr=stdout, text=True
        )

    def _command(self, command: str, *options: str) -> list[str]:
        words = [sys.executable, "-m", "megatron_btx.cli", command, str(self.recipe)]
        return [*words, *options]

    def submit(self, *options: str, **environment: str) -> dict[str, str]:
        """Job numbers by stage."""
        done = self.btx("submit", *options, **environment)
        assert done.returncode == 0, done.stderr
        rows = [line.split() for line in done.stdout.splitlines()[:-1]]
        return {row[1]: row[0] for row in rows}

    def status(self) -> dict[str, dict[str, Any]]:
        """Rows of ``btx status`` by stage."""
        done = self.btx("status", "--json")
        assert done.returncode == 0, done.stderr
        return {row["stage"]: row for row in json.loads(done.stdout)}

    def queue(self) -> list[str]:
        """Jobs of this run that are not over."""
        lines = self.cluster("squeue", "-h", "-o", "%A|%Z").splitlines()
        jobs = (line.split("|", 1) for line in lines)
        places = (str(self.run_dir), str(self.directory))  # submitted, or by hand
        return [number for number, place in jobs if place in places]

    def finished(self) -> None:
        """Wait until no job of this run is left."""
        wait(lambda: not self.queue(), f"the queue to empty: {self.out()}")

    def steps(self, stage: str) -> list[tuple[int, float, float]]:
        """Step, loss and gradient norm of every training step so far."""
        path = self.run_dir / stage / "metrics.jsonl"
        records = read(path) if path.exists() else []
        return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "train"]

    def training(self, stage: str, job: str, after: int = 60) -> None:
        """Wait until a stage has done so many steps."""

        def there() -> bool:
            assert job in self.queue(), self.out()
            return len(self.steps(stage)) >= after

        wait(there, f"{stage} to train")

    def out(self) -> str:
        """What the batch scripts and the ranks have said."""
        files = [*self.run_dir.glob("slurm/*/*.out"), *self.run_dir.glob("*/log/*.log")]
        return "\n".join(f"{path}:\n{path.read_text()}" for path in files)

    def batch_script(self, job: str) -> int:
        """Process of a job's script."""
        for pid in self.cluster.processes():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={job}".encode() in environment and any(
                    word.endswith(b"/slurm_script") for word in words
                ):
                    return pid
        raise AssertionError(f"job {job} has no script")

    def ranks(self, stage: str) -> list[int]:
        """Processes of a stage's ranks."""
        words = {b"megatron_btx.cli", stage.encode(), str(self.run_dir / "recipe.yaml").encode()}
        return [pid for pid in self.cluster.processes() if _is_rank(pid, words)]

    def kill_rank(self, stage: str) -> None:
        """kill -9."""
        os.kill(self.ranks(stage)[-1], signal.SIGKILL)


def sums(path: Path, most: int = 99) -> Path:
    """Text of one's own, written once."""
    if path.exists():
        return path
    draw = random.Random(most)
    with path.open("w") as file:
        for _ in range(1000):
            pairs = [(draw.randint(0, most), draw.randint(0, most)) for _ in range(20)]
            text = "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _is_rank(pid: int, expected: set[bytes]) -> bool:
    with contextlib.suppress(OSError, psutil.Error):  # it has ended meanwhile
        words = set(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"))
        parent = psutil.Process(pid).parent()
        return expected <= words and parent is not None and parent.name() == "slurmstepd"
    return False


WAITS = """#!/bin/sh
case "$*" in *slurm.attempt*) ;; *) sleep 60 ;; esac
exec "$@"
"""
"""A launcher whose ranks are never there in time."""

SLOW = "{tokens: 204_800, save_interval: 50, eval_interval: 0, check_replicas_interval: 0}"
"""400 steps instead of 32: something to be interrupted."""


@pytest.fixture(scope="session")
def whole(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The whole graph, one expert of which fails, is mended and submitted again."""
    run = Run(cluster, tmp_path_factory.mktemp("whole"))
    run.write(BROKEN)
    run.first = run.submit(WANDB_API_KEY=SECRET)  # type: ignore[attr-defined]
    run.finished()
    run.failed = run.status()  # type: ignore[attr-defined]
    run.write(MENDED)
    run.second = run.submit()  # type: ignore[attr-defined]
    run.finished()
    return run


NODES = "slurm: {environment: {GLOO_SOCKET_IFNAME: lo}, stages: {finetune: {nodes: 2}}}\n"
MENDED = NODES + "wandb: {mode: offline}\n"
BROKEN = MENDED + "experts: {math: {megatron: {transformer: {hidden_dropout: 2.0}}}}\n"


def branch(
    whole: Run, directory: Path, text: str, *stages: str, cluster: Cluster | None = None
) -> Run:
    """A run of its own that starts from finished stages of another."""
    run = Run(cluster or whole.cluster, directory, text)
    for stage in stages:
        shutil.copytree(whole.run_dir / stage, run.run_dir / stage)
    return run


def longer_finetune(whole: Run, directory: Path, more: str = "") -> Run:
    """200 steps over two nodes, its experts those of the whole run."""
    text = MENDED + more + f"finetune: {SLOW.replace('204_800', '102_400')}\n"
    experts = [f"expert-{domain}" for domain in ("code", "math", "prose")]
    return branch(whole, directory, text, "prepare", "seed", *experts)
