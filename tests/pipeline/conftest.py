"""A run of fake stages: the whole command line in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was before each test: a rank completes its own (``RANK``, ``BTX_ATTEMPT``, ...), and
    what one that is called in this process has set would reach the processes of later tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


class Run:
    """``btx run`` on the tiny recipe, its ranks fake; ``wish`` says how they behave."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        self.recipe = directory / "recipe.yaml"
        self.recipe.write_text(f"base: {TINY}\nrun_dir: {self.run_dir}\n")
        self.started: list[subprocess.Popen[str]] = []

    def environment(self, wish: dict[str, Any] | None = None) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.directory),
            "BTX_FAKE": json.dumps(wish or {}),
            "BTX_TEST_RUN": str(self.directory),  # by which the tests know their processes
        }

    def start(self, *options: str, wish: dict[str, Any] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.pipeline.fake_btx", "run", str(self.recipe)]
        process = subprocess.Popen(
            [*command, *options],
            cwd=self.directory,
            env=self.environment(wish),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def __call__(self, *options: str, wish: dict[str, Any] | None = None) -> tuple[int, str, str]:
        process = self.start(*options, wish=wish)
        output, errors = process.communicate(timeout=600)
        return process.returncode, output, errors

    def processes(self) -> list[psutil.Process]:
        """Everything alive that descends from this test's runs, wherever it hangs now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BTX_TEST_RUN") == str(self.directory):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if _lives(process)]

    def commands(self, word: str) -> list[list[str]]:
        """Command lines of those that have ``word`` in theirs."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                found.append(process.cmdline())
        return [command for command in found if word in command]

    def wait(self, condition: Callable[[], bool], timeout: float = 600) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.02)

    def steps(self, stage: str) -> list[int]:
        """Steps in a stage's metrics so far."""
        path = self.run_dir / stage / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record["step"] for record in records if record["kind"] == "train"]


def _lives(process: psutil.Process) -> bool:
    """Whether it runs: what has ended is a zombie until its parent asks for it, then gone."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """One recipe and its runs; nothing of them is left running."""
    runs = Run(tmp_path)
    yield runs
    for process in runs.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    runs.wait(lambda: not runs.processes())
