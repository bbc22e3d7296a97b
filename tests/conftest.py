"""What every room's tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad import Commands
from tests.ranks import Ranks
from tests.small import FAKE_KEY, Exported, btx, export, write_small

LONGEST = (
    "tests/cli/test_run.py",
    "tests/examples",
    "tests/engine/test_layouts.py",
    "tests/cli/test_wandb.py",
)
"""Files of minutes, begun first: two workers then end at the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put them first; all else stays in its order (`make test` says --no-loadscope-reorder)."""

    def place(item: pytest.Item) -> int:
        starts = (item.nodeid.startswith(name) for name in LONGEST)
        return next((i for i, long in enumerate(starts) if long), len(LONGEST))

    items.sort(key=place)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """A pool of gloo ranks, kept for the session."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Checkpoints of another run, for those that start from some."""
    return export(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="session")
def taken(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one that begins where ``exported`` ended.

    The seed was trained under TP2; here everything is EP2, and nothing is said of a tokenizer.
    """
    directory = tmp_path_factory.mktemp("taken")
    (directory / "recipe.yaml").write_text(
        f"base: {exported.directory / 'recipe.yaml'}\n"
        "name: taken\n"
        "tokenizer: null\n"
        f"seed: {{from: {exported.run_dir / 'seed'}}}\n"
        f"experts: {{math: {{from: {exported.run_dir / 'expert-math'}}}}}\n"
        "finetune: {layout: {data_parallel_size: 2, expert_model_parallel_size: 2}}\n"
        "wandb: {mode: offline}\n"
    )
    done = btx("run", "recipe.yaml", cwd=directory, environment={"WANDB_API_KEY": FAKE_KEY})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to upload: wandb sync" in done.stdout
    assert FAKE_KEY not in done.stdout + done.stderr
    return directory / "runs" / "taken"


@pytest.fixture
def small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Commands:
    """The small recipe in a directory of its own, and commands on it."""
    write_small(tmp_path)
    return Commands(tmp_path, monkeypatch, capsys)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Small disks of memory, mounted where a test may."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"disk{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "btx-test", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a disk of memory cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
