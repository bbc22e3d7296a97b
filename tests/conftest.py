"""What every room's tests share."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.bad import Commands
from tests.budget import Rooms
from tests.ranks import Ranks
from tests.small import FAKE_KEY, Exported, btx, export, write_small

# Before torch is imported. Ranks would take what a job or a launcher has set in which the tests run
# for their own.
JOBS = r"(SLURM|SBATCH|SRUN|TORCHELASTIC)_|(LOCAL_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$"
for variable in [name for name in os.environ if re.match(JOBS, name)]:
    del os.environ[variable]
# Two workers use two cores, and more threads would only spin.
os.environ["OMP_NUM_THREADS"] = "1"
if not os.environ.get("BTX_TEST_GPU"):  # where there is one, gloo ranks would not be what is tried
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Until the tests are collected: half a million objects are imported, and none of them is garbage.
gc.disable()

# Beside other work everything takes its time, an example and drawing it too.
hypothesis.settings.register_profile(
    "btx", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("btx")

LONGEST = (
    "tests/cli/test_run.py",
    "tests/examples",
    "tests/engine/test_layouts.py",
    "tests/cli/test_wandb.py",
)
"""Files of minutes, begun first: the workers then end at the same time."""


Shared = Callable[[str, Callable[[Path], None]], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Print at the end what each room has cost; hear Ctrl-C."""
    # A shell's background jobs ignore Ctrl-C, and would hand that on to every process of a test.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "TORCH_EXTENSIONS_DIR" not in os.environ:
        # Megatron 0.19 compiles one. In the user's cache a build that was killed leaves a lock, and
        # every later one waits for ever; workers inherit this and compile once.
        folder = tempfile.TemporaryDirectory(prefix="btx-extensions-")
        os.environ["TORCH_EXTENSIONS_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
    workers = config.getoption("numprocesses", None)
    config.pluginmanager.register(Rooms(books=not workers or hasattr(config, "workerinput")))


def pytest_collection_finish() -> None:
    """What has been imported stays: the search for garbage need not look at it."""
    gc.freeze()
    gc.enable()


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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """What is costly, made once for all workers of a session: ``shared(name, make)`` is a directory
    that ``make(directory)`` has filled in the worker that asked first. Nobody writes to it then."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], None]) -> Path:
        directory, made = common / name, common / f"{name}.made"
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                shutil.rmtree(directory, ignore_errors=True)  # what a failed attempt has left
                directory.mkdir()
                make(directory)
                made.touch()
        return directory

    return get


@pytest.fixture(scope="session")
def exported(shared: Shared) -> Exported:
    """Checkpoints of another run, for those that start from some."""
    return Exported(shared("exported", export))


@pytest.fixture(scope="session")
def taken(exported: Exported, shared: Shared) -> Path:
    """The run directory of one that begins where ``exported`` ended.

    The seed was trained under TP2; here everything is EP2, and nothing is said of a tokenizer.
    """

    def make(directory: Path) -> None:
        (directory / "recipe.yaml").write_text(
            f"base: {exported.directory / 'recipe.yaml'}\n"
            "name: taken\n"
            "tokenizer: null\n"
            f"seed: {{from: {exported.run_dir / 'seed'}}}\n"
            f"experts: {{math: {{from: {exported.run_dir / 'expert-math'}}}}}\n"
            "finetune: {layout: {data_parallel_size: 2, expert_model_parallel_size: 2}}\n"
            "evaluate: {layout: {data_parallel_size: 2, expert_model_parallel_size: 2}}\n"
            "wandb: {mode: offline}\n"
        )
        done = btx("run", "recipe.yaml", cwd=directory, environment={"WANDB_API_KEY": FAKE_KEY})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "to upload: wandb sync" in done.stdout
        assert FAKE_KEY not in done.stdout + done.stderr

    return shared("taken", make) / "runs" / "taken"


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
