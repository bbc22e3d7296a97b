"""What can befall a job, on a real Slurm. Slurm lets a requeued job wait for seconds and looks at
time limits twice a minute, so the runs go side by side: one computes while another waits."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.train.goodput import read_attempts
from tests.slurm.cluster import Cluster, wait
from tests.slurm.conftest import LO, MATH, ROOT, SLOW, WAITS, Run, branch, longer_finetune, sums
from tests.slurm.ranks_disturbed import a_rank_hangs, a_rank_hangs_as_it_evaluates, a_slow_rank

LO_AND = "slurm: {environment: {GLOO_SOCKET_IFNAME: lo}%s}\n"
"""Scenarios share nodes; those that harm a node or another job have a cluster of their own."""

Losses = list[tuple[int, float, float]]
Scenario = Callable[["Around"], object]


class Around:
    """What a scenario starts from."""

    def __init__(self, whole: Run, directory: Path) -> None:
        self.whole, self.directory = whole, directory
        self.futures: dict[str, Future[Any]] = {}

    def undisturbed(self, scenario: Scenario) -> Losses:
        """The losses that another one saw."""
        losses: Losses = self.futures[scenario.__name__].result()
        return losses

    def place(self, name: str) -> Path:
        """A new directory."""
        return self.directory / name


def a_seed(around: Around) -> Losses:
    """Nothing befalls it."""
    run = slow_seed(around, "undisturbed seed")
    run.finished()
    assert len(run.steps("seed")) == 400, run.out()
    return run.steps("seed")


def a_finetuning(around: Around) -> Losses:
    """Nothing befalls it, on two nodes."""
    run = longer_finetune(around.whole, around.place("undisturbed finetune"))
    run.submit("--only", "finetune")
    run.finished()
    assert len(run.steps("finetune")) == 200, run.out()
    return run.steps("finetune")


def slow_seed(
    around: Around, name: str, text: str = LO, cluster: Cluster | None = None, **environment: str
) -> Run:
    """A seed of 400 steps, submitted."""
    text = f"{text}seed: {SLOW}\n"
    run = branch(around.whole, around.place(name), text, "prepare", cluster=cluster)
    run.job = run.submit("--only", "seed", **environment)["seed"]  # type: ignore[attr-defined]
    return run


def usr1_over_two_hosts(around: Around) -> None:
    """As ``--signal=B:USR1@`` sends it, now and without a time limit: the ranks save and go on."""
    run = longer_finetune(around.whole, around.place("usr1"))
    job = run.submit("--only", "finetune")["finetune"]
    watch = Watch(run)
    run.training("finetune", job)
    nodes = {run.cluster.state(job)["NodeList"]}
    run.cluster("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: (run.run_dir / "finetune" / "stopped.json").exists(), run.out())
    stopped = json.loads((run.run_dir / "finetune" / "stopped.json").read_text())
    assert (run.run_dir / stopped["checkpoint"] / "manifest.json").exists()
    assert 60 <= stopped["step"] < 200
    logs = run.start("logs", "finetune", "-f")
    run.finished()
    nodes.add(run.cluster.state(job)["NodeList"])
    row = run.status()["finetune"]
    assert (row["state"], row["restarts"]) == ("done", 1), run.out()
    assert "requeued: the ranks have saved" in run.out()
    output, _ = logs.communicate(timeout=600)
    assert logs.returncode == 0, output
    seen = watch.end()
    screens = seen.split("\x1b[H\x1b[J")
    assert len(screens) > 5
    rows = [line.split() for line in seen.splitlines() if line.startswith("finetune")]
    assert all(row[1] == job for row in rows), seen
    assert {"running", "done"} <= {row[2] for row in rows}, seen
    at = {row[4] for row in rows if row[2] == "running" and row[3] in nodes}
    # On a slow machine an attempt takes longer to start than to train, and is seen then alone.
    assert any(step == "starting" or step.endswith("/200") for step in at), seen
    assert rows[-1][2] == "done"
    assert run.steps("finetune") == around.undisturbed(a_finetuning)
    offline = list((run.run_dir / "finetune" / "wandb").glob("offline-run-*"))
    assert len(offline) == 2  # a piece an attempt,
    assert len({path.name.rpartition("-")[2] for path in offline}) == 1  # one run


class Watch:
    """``btx status --watch`` in a terminal."""

    def __init__(self, run: Run) -> None:
        self.terminal, inside = pty.openpty()
        self.process = run.start("status", "--watch", "0.5", stdout=inside)
        os.close(inside)

    def end(self) -> str:
        """All that it showed; it ends with the run's last job."""
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while select.select([self.terminal], [], [], 600)[0]:
                seen += os.read(self.terminal, 65536)
        assert self.process.wait(600) == 0, seen
        os.close(self.terminal)
        return seen.decode().replace("\r\n", "\n")


def in_a_container(around: Around) -> None:
    """Ranks in a container with a root of its own that holds no Slurm and no shell."""
    image, launch = container(around.place("image"), around.place("container"))
    text = LO_AND % f", launch_prefix: '{launch}'"
    run = slow_seed(around, "container", text, USER="root")
    run.training("seed", run.job)
    roots = {os.path.realpath(f"/proc/{pid}/root") for pid in run.ranks("seed")}
    inside = [Path(f"/proc/{pid}/root/this-is-the-image").exists() for pid in run.ranks("seed")]
    assert inside == [True], roots
    run.cluster("scancel", "--batch", "--signal=USR1", run.job)
    run.finished()
    row = run.status()["seed"]
    assert (row["state"], row["restarts"]) == ("done", 1), run.out()
    assert "requeued: the ranks have saved" in run.out()
    assert run.steps("seed") == around.undisturbed(a_seed)


def container(image: Path, directory: Path) -> tuple[Path, str]:
    """An image for Charliecloud, and the words that run a command in it: the system's libraries,
    the interpreter, the package and the run's directory, each where it is outside."""
    places = ["/usr/lib", "/usr/lib64", sys.prefix, sys.base_prefix, str(ROOT), str(directory)]
    for place in [*places, "/etc", "/proc", "/sys", "/dev", "/tmp", "/home", "/root"]:
        (image / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (image / "etc" / name).touch()
    for name in ("lib", "lib64"):
        (image / name).symlink_to(f"usr/{name}")
    (image / "this-is-the-image").touch()
    binds = " ".join(f"--bind={place}:{place}" for place in places if Path(place).exists())
    directory.mkdir()
    return image, f"ch-run --private-tmp {binds} --bind={directory}:{directory} {image} --"


def requeued_preempted_and_its_node_lost(around: Around) -> None:
    """One run, three times."""
    with Cluster(around.place("cluster-three"), nodes=2) as cluster:
        run = slow_seed(around, "three", cluster=cluster)

        def trained() -> str:
            """It has done so many steps more; its node."""
            run.training("seed", run.job, after=len(run.steps("seed")) + 60)
            return cluster.state(run.job)["NodeList"]

        def restarted(times: int) -> None:
            wait(lambda: cluster.state(run.job)["Restarts"] == str(times), run.out())

        trained()
        cluster("scontrol", "requeue", run.job)
        restarted(1)
        urgent = ["--partition=urgent", "--exclusive", f"--nodelist={trained()}", "--chdir=/"]
        cluster("sbatch", *urgent, "--output=/dev/null", "--wrap=sleep 1")
        restarted(2)
        node = trained()
        cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        restarted(3)
        run.finished()
        assert run.status()["seed"]["state"] == "done", run.out()
        assert run.steps("seed") == around.undisturbed(a_seed)


def a_rank_killed_and_a_job_cancelled(around: Around) -> None:
    """Each time submitted again; a second submission beside its jobs is refused."""
    run = longer_finetune(around.whole, around.place("killed"))
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job, after=70)  # a checkpoint after 50
    run.kill_rank("finetune")
    run.finished()
    row = run.status()["finetune"]
    assert row["state"] == "failed"
    assert row["note"]
    job = run.submit("--only", "finetune")["finetune"]
    run.training("finetune", job, after=100)
    rank = run.ranks("finetune")[-1]
    os.kill(rank, signal.SIGSTOP)  # else it may be through before the commands have begun
    refused = run.btx("submit", "--only", "finetune")
    assert refused.returncode == 2
    assert "jobs of this run are in the queue" in refused.stderr
    done = run.btx("cancel")
    os.kill(rank, signal.SIGCONT)
    assert f"cancelled {job} (finetune)" in done.stdout, done.stderr
    run.finished()
    assert run.status()["finetune"]["state"] in ("cancelled", "stopped")
    run.submit("--only", "finetune")
    run.finished()
    assert run.status()["finetune"]["state"] == "done", run.out()
    assert (run.run_dir / "finetune" / "log" / "attempt-3.log").exists()
    assert run.steps("finetune") == around.undisturbed(a_finetuning)


ASKED = "asked to stop (USR1)"


def restarts_without_progress(around: Around) -> None:
    """Asked to stop before its first step, again and again: four starts, then it gives up."""
    waits = around.place("waits") / "launch"
    waits.parent.mkdir(parents=True, exist_ok=True)
    waits.write_text(WAITS)
    waits.chmod(0o755)
    run = slow_seed(around, "loop", LO_AND % f", launch_prefix: '{waits}'")
    attempts = run.run_dir / "seed" / "attempts.jsonl"
    for start in (1, 2, 3, 4):
        wait(lambda: _lines(attempts) == start, run.out())  # noqa: B023
        heard = run.out().count(ASKED)
        for _ in range(10):  # one was seen to be lost while a step began
            run.cluster("scancel", "--batch", "--signal=USR1", run.job)
            time.sleep(4)
            if run.out().count(ASKED) > heard:
                break
        wait(lambda: run.cluster.state(run.job)["Restarts"] == str(start), run.out())  # noqa: B023
    run.finished()
    row = run.status()["seed"]
    assert row["state"] == "failed", run.out()
    assert "has been restarted 3 times without progress" in row["note"]
    assert row["restarts"] == 4
    assert run.steps("seed") == []
    assert run.out().count(ASKED) >= 4


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def a_time_limit(around: Around) -> None:
    """It comes with a signal. Slurm looks every half minute and counts in whole ones."""
    text = LO_AND % ', signal_seconds: 50, time: "1"'
    seed = SLOW.replace("204_800", "20_480_000")
    run = branch(around.whole, around.place("limit"), f"{text}seed: {seed}\n", "prepare")
    job = run.submit("--only", "seed")["seed"]
    wait(lambda: run.cluster.state(job)["Restarts"] == "1", run.out())
    assert "asked to stop (USR1)" in run.out()
    assert "requeued: " in run.out()
    run.btx("cancel")
    run.finished()


def the_controller_killed_while_a_requeue_is_asked_for(around: Around) -> None:
    """The job asks on until there is one again; a log that is followed is followed on."""
    with Cluster(around.place("cluster-asked"), nodes=1) as cluster:
        text = f"{LO}seed: {SLOW}\n"
        run = branch(around.whole, around.place("asked"), text, "prepare", cluster=cluster)
        job = run.submit("--only", "seed")["seed"]
        run.training("seed", job)
        logs = run.start("logs", "seed", "-f")
        cluster.kill("controller")
        os.kill(run.batch_script(job), signal.SIGUSR1)
        wait(lambda: "the controller does not answer; it is asked again" in run.out())
        assert logs.poll() is None
        assert run.btx("status").returncode == 2
        cluster.start_controller()
        run.finished()
        row = run.status()["seed"]
        assert (row["state"], row["restarts"]) == ("done", 1), run.out()
        assert "refuses" not in run.out()
        output, _ = logs.communicate(timeout=600)
        assert logs.returncode == 0, output
        assert "requeued: the ranks have saved" in run.out()
        assert run.steps("seed") == around.undisturbed(a_seed)


def a_lost_node_whose_ranks_live_on(around: Around) -> None:
    """Slurm starts the job elsewhere; it asks them to save and to end, and goes on from there."""
    with Cluster(around.place("cluster-lost"), nodes=2) as cluster:
        text = f"{LO}seed: {SLOW}\n"
        run = branch(around.whole, around.place("lost"), text, "prepare", cluster=cluster)
        job = run.submit("--only", "seed")["seed"]
        run.training("seed", job)
        node = cluster.state(job)["NodeList"]
        (rank,) = run.ranks("seed")
        os.kill(rank, signal.SIGSTOP)  # else it would be through before it is missed
        cluster.kill(node)
        cluster("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait(lambda: "they are asked to end" in run.out())
        os.kill(rank, signal.SIGCONT)
        run.finished()
        row = run.status()["seed"]
        assert (row["state"], row["restarts"]) == ("done", 1), run.out()
        assert f"ranks of this job live on ({node}): they are asked to end" in run.out()
        first, second = read_attempts(run.run_dir / "seed")  # what the first did is kept
        begun, kept = (float(one["progress"].removeprefix("step_")) for one in (first, second))
        assert kept >= 60 > begun
        assert run.steps("seed") == around.undisturbed(a_seed)


def gpus(around: Around) -> None:
    """Device files only: the ranks are given theirs, and refuse to compute on the CPU instead. With
    nothing to tell them, they train there."""
    tell = around.place("tell")
    tell.write_text(
        '#!/bin/sh\necho "GPUs $CUDA_VISIBLE_DEVICES, task $SLURM_LOCALID"\nexec "$@"\n'
    )
    tell.chmod(0o755)
    text = LO_AND % f", gpus_per_node: 2, launch_prefix: '%s{tell}'"
    text += "seed: {layout: {data_parallel_size: 2}}\n"
    run = branch(around.whole, around.place("gpus"), text % "", "prepare")
    job = run.submit("--only", "seed")["seed"]
    assert run.cluster.state(job)["TresPerNode"] == "gres:gpu:2"
    run.finished()
    row = run.status()["seed"]
    assert row["state"] == "failed"
    assert "2 GPU(s) are the job's" in row["note"]
    run.write(text % "env -u SLURM_GPUS_ON_NODE ")
    run.submit("--only", "seed")
    run.finished()
    assert run.status()["seed"]["state"] == "done", run.out()
    for attempt in (1, 2):
        log = (run.run_dir / "seed" / "log" / f"attempt-{attempt}.log").read_text()
        assert "GPUs 0,1, task 0" in log
        assert "GPUs 0,1, task 1" in log
    assert len(run.steps("seed")) == 32


def one_domain_changed(around: Around) -> None:
    """Repeats that expert and what follows it; seed and other experts stay as they are."""
    stages = ["prepare", "seed", "expert-code", "expert-math", "expert-prose", "mix", "finetune"]
    stages += ["dense", "evaluate", "export", "report"]
    text = LO + "wandb: {mode: offline}\n"
    run = branch(around.whole, around.place("changed"), text, *stages)
    shutil.copy(around.whole.run_dir / "results.json", run.run_dir)
    assert "all selected stages are done" in run.btx("submit").stdout
    before = files(run)
    other = sums(run.directory / "other.jsonl", most=999)
    run.write(text + MATH.format(other))
    submitted = list(run.submit())
    assert submitted == [
        "prepare", "expert:math", "mix", "finetune", "dense", "evaluate", "export", "report",
    ]  # fmt: skip
    run.finished()
    assert {row["state"] for row in run.status().values()} == {"done"}, run.out()
    after = files(run)
    same = {path for path, stat in before.items() if after.get(path) == stat}
    for stage in ("seed", "expert-code", "expert-prose", "prepare/data/code"):
        assert {p for p in before if p.startswith(f"{stage}/")} <= same
    for stage in ("expert-math", "finetune", "dense", "evaluate", "export", "report"):
        assert f"{stage}/done.json" not in same
    assert run.steps("expert-math") != around.whole.steps("expert-math")
    assert "all selected stages are done" in run.btx("submit").stdout


def files(run: Run) -> dict[str, tuple[int, int]]:
    """Size and time of everything that the stages made."""
    found = {}
    for path in run.run_dir.rglob("*"):
        if path.is_file() and path.name not in ("lock", "stage.json"):
            stat = path.stat()
            found[str(path.relative_to(run.run_dir))] = (stat.st_size, stat.st_mtime_ns)
    return found


def the_same_by_hand_and_without_slurm(around: Around) -> None:
    """A template with sbatch, and ``btx run``."""
    whole = around.whole
    hand = branch(whole, around.place("hand"), f"{LO}wandb: {{mode: offline}}\n", "prepare", "seed")
    environment = {**hand.environment, "BTX_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "lo"}
    command = ["sbatch", "--parsable", str(ROOT / "slurm" / "expert.sbatch")]
    job = subprocess.run(
        [*command, str(hand.recipe), "math"],
        env=environment,
        cwd=hand.directory,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    local = branch(whole, around.place("local"), "wandb: {mode: offline}\n", "prepare")
    done = local.btx("run", "--stop-after", "expert:math")
    assert done.returncode == 0, done.stderr
    for stage in ("seed", "expert-math"):
        assert local.steps(stage) == whole.steps(stage)
    hand.finished()
    text = (hand.directory / f"expert-{job}.out").read_text()
    assert "expert:math: done" in text, text
    assert hand.steps("expert-math") == whole.steps("expert-math")


SCENARIOS: tuple[Scenario, ...] = (
    a_seed,
    a_finetuning,
    requeued_preempted_and_its_node_lost,
    restarts_without_progress,
    usr1_over_two_hosts,
    in_a_container,
    a_rank_killed_and_a_job_cancelled,
    a_time_limit,
    gpus,
    the_controller_killed_while_a_requeue_is_asked_for,
    a_lost_node_whose_ranks_live_on,
    a_rank_hangs,
    a_rank_hangs_as_it_evaluates,
    a_slow_rank,
    one_domain_changed,
    the_same_by_hand_and_without_slurm,
)


@pytest.fixture(scope="module")
def side_by_side(
    whole: Run, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Around]:
    """Those that are asked for, three at a time; afterwards no job and no process is left."""
    around = Around(whole, tmp_path_factory.mktemp("disturbed"))
    wanted = [item.name for item in request.session.items]
    with ThreadPoolExecutor(3) as pool:
        for scenario in SCENARIOS:
            if scenario in (a_seed, a_finetuning) or f"test_it[{scenario.__name__}]" in wanted:
                around.futures[scenario.__name__] = pool.submit(scenario, around)
        yield around
    queue = whole.cluster.queue()
    whole.cluster.clear()
    assert not queue
    wait(lambda: not whole.cluster.processes(), "the last process to end")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_it(scenario: Scenario, side_by_side: Around) -> None:
    side_by_side.futures[scenario.__name__].result()
