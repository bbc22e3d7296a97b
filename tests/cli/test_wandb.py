"""What is logged offline, read back from W&B's own files.

The pinned version reads them in its Go service only, so that ``records`` is the format (LevelDB's
log: blocks of 32 KiB, each record behind its checksum, length and kind) around W&B's own protobuf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import WandB
from megatron_btx.train.metrics import read
from megatron_btx.train.tracking import Tracker, sync_command
from megatron_btx.weights.file_hashes import hash_file, hashes_of
from megatron_btx.weights.find_checkpoint import find_checkpoint
from tests.small import FAKE_KEY, ROOT, Exported, command, environ, write_small

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a ``.wandb`` file."""
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, whole = HEADER, b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            break
        position += HEADER
        whole += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def logged(stage: Path) -> tuple[list[Any], dict[int, dict[str, Any]]]:
    """Every piece's description of its run, and what was logged by step over all pieces."""
    runs, history = [], {}
    for path in sorted(stage.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                runs.append(record.run)
            elif kind == "history":
                values = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                history.setdefault(int(values["_step"]), {}).update(values)
    return runs, history


def artifacts(stage: Path) -> dict[str, list[Any]]:
    """What the run of a stage uses and makes, as its last piece says."""
    found: dict[str, list[Any]] = {"used": [], "made": []}
    piece = max(stage.glob("wandb/offline-run-*/*.wandb"))
    for record in records(piece):
        if record.WhichOneof("record_type") == "artifact":
            found["used" if record.artifact.use_after_commit else "made"].append(record.artifact)
    return found


def summaries(stage: Path) -> list[dict[str, Any]]:
    """The run's summary as each piece has left it."""
    found = []
    for path in sorted(stage.glob("wandb/offline-run-*/*.wandb")):
        values: dict[str, Any] = {}
        for record in records(path):
            if record.WhichOneof("record_type") == "summary":
                for item in record.summary.update:
                    values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        found.append(values)
    return found


def test_pieces_of_a_resumed_stage_are_one_run(exported: Exported) -> None:
    runs, history = logged(exported.run_dir / "seed")
    assert len(runs) >= 2, "one piece before Ctrl-C, one after"
    assert len({run.run_id for run in runs}) == 1
    assert {run.run_group for run in runs} == {"small"}
    assert {run.job_type for run in runs} == {"seed"}
    assert {run.display_name for run in runs} == {"seed"}
    expert, _ = logged(exported.run_dir / "expert-math")
    assert {(run.run_group, run.job_type, run.display_name) for run in expert} == {
        ("small", "expert", "expert:math")
    }
    assert expert[0].run_id != runs[0].run_id
    # Every step, with the values of metrics.jsonl.
    for record in read(exported.run_dir / "seed" / "metrics.jsonl"):
        if record["kind"] == "train":
            values = history[record["step"]]
            for name in ("loss", "lr", "grad_norm", "tokens_per_second"):
                assert values[f"train/{name}"] == record[name]
        elif record["kind"] == "eval":
            for domain, loss in record["loss"].items():
                assert history[record["step"]][f"eval/loss/{domain}"] == loss


def test_the_summary_is_that_of_metrics_jsonl(exported: Exported) -> None:
    seed = exported.run_dir / "seed"
    logged = [r for r in read(seed / "metrics.jsonl") if r["kind"] == "summary"][-1]
    values = summaries(seed)[-1]
    names = [name for name in logged if "/" in name]
    assert "goodput/share" in names
    assert {name: values[f"summary/{name}"] for name in names} == {n: logged[n] for n in names}


def names(artifacts: list[Any]) -> dict[str, str]:
    """Name -> digest: what makes two of one name the same version."""
    return {artifact.name: artifact.digest for artifact in artifacts}


def test_what_stages_make_and_use_is_a_graph(taken: Path, exported: Exported) -> None:
    """From the text over seed and expert to the mix and its finetuning, each by its hashes."""
    found = {
        path.parent.name: artifacts(path.parent)
        for run_dir in (exported.run_dir, taken)
        for path in run_dir.glob("*/wandb_run_id")
    }
    data, seed = found["prepare"]["made"], artifacts(exported.run_dir / "seed")["made"]
    assert [artifact.type for artifact in (*data, *seed)] == ["dataset", "model"]
    branched = artifacts(exported.run_dir / "expert-math")
    assert names(branched["used"])["small-seed"] == seed[0].digest
    mix, finetuned, evaluated = found["mix"], found["finetune"], found["evaluate"]
    # What was taken from another run is there with that one's content.
    used = names(mix["used"])
    assert used["taken-seed"] == seed[0].digest
    assert used["taken-expert-math"] == branched["made"][0].digest
    assert names(finetuned["used"]) == names(data) | names(mix["made"])
    assert finetuned["made"][0].name == "taken-finetune"
    assert names(evaluated["used"])["taken-finetune"] == finetuned["made"][0].digest
    assert evaluated["made"][0].name == "taken-evaluate"
    # By reference, with the hashes of the files.
    (model,) = finetuned["made"]
    checkpoint = find_checkpoint(taken / "finetune")
    hashes = hashes_of(checkpoint)
    entries = {entry.path: entry for entry in model.manifest.contents}
    assert entries.keys() == hashes.keys() | {"hashes.json"}
    for name, entry in entries.items():
        assert entry.ref == (checkpoint / name).resolve().as_uri()
        assert not entry.local_path
        (extra,) = entry.extra
        assert json.loads(extra.value_json) == hashes.get(name, hash_file(checkpoint / name))
    assert json.loads(model.metadata)["directory"] == str(checkpoint.resolve())


def test_an_moe_logs_balance_and_load(taken: Path) -> None:
    _, history = logged(taken / "finetune")
    evals = [r for r in read(taken / "finetune" / "metrics.jsonl") if r["kind"] == "eval"]
    assert history[1]["train/balance_loss"] > 0
    for record in evals:
        values = history[record["step"]]
        for domain, layers in record["load"].items():
            for layer, shares in enumerate(layers):
                for expert, share in enumerate(shares):
                    assert values[f"eval/load/{domain}/{layer}/{expert}"] == share


def test_without_a_key_it_says_so_and_names_the_command(exported: Exported) -> None:
    assert "warning: W&B has no API key" in exported.output
    assert "logging offline" in exported.output
    upload = sync_command(Path("runs/small"))
    assert f"to upload: {upload}" in exported.output
    # The pinned version takes the command, and finds the pieces.
    dry = subprocess.run(
        ["bash", "-c", upload.replace("wandb sync", f"{sys.executable} -m wandb sync --dry-run")],
        cwd=exported.directory,
        env=environ({"HOME": str(exported.directory / "home")}),
        capture_output=True,
        text=True,
    )
    assert dry.returncode == 0, dry.stderr
    pieces = list(exported.run_dir.glob("*/wandb/offline-run-*/*.wandb"))
    assert f"Would sync {len(pieces)} run(s)" in dry.stdout + dry.stderr


def test_a_foreign_apex_is_a_warning(exported: Exported) -> None:
    assert "warning: the installed package 'apex' is not NVIDIA's Apex" in exported.output


def test_a_key_is_never_written(taken: Path) -> None:
    """The key in the environment of that run is in no file of it."""
    files = [path for path in taken.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert [path for path in files if FAKE_KEY.encode() in path.read_bytes()] == []


def test_without_network_a_stage_logs_offline(tmp_path: Path) -> None:
    """A key, but nobody who answers: at once where the address refuses, and where W&B itself gives
    up, with its service still holding the run's id."""
    (tmp_path / "script.py").write_text(
        "import dataclasses, sys\n"
        "from pathlib import Path\n"
        "from megatron_btx.recipe.load import load_recipe\n"
        "from megatron_btx.recipe.schema import WandB\n"
        "from megatron_btx.train import tracking\n"
        "recipe = load_recipe(sys.argv[1])\n"
        "recipe = dataclasses.replace(recipe, wandb=WandB(mode='online'))\n"
        "if sys.argv[2] == 'late':\n"
        "    tracking._answers = lambda: True\n"
        "tracker = tracking.Tracker(recipe, 'seed', Path('.'), {})\n"
        "tracker.log({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "tracker.close()\n"
    )
    for moment in ("early", "late"):
        directory = tmp_path / moment
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, "../script.py", str(ROOT / "examples/tiny/recipe.yaml"), moment],
            cwd=directory,
            env=environ(
                {
                    "HOME": str(directory),
                    "WANDB_API_KEY": FAKE_KEY,
                    "WANDB_BASE_URL": "http://127.0.0.1:9",
                    "WANDB_INIT_TIMEOUT": "3",
                }
            ),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "W&B cannot be reached" in done.stderr
        assert FAKE_KEY not in done.stdout + done.stderr
        assert logged(directory)[1][1]["train/loss"] == 1.0


def test_its_service_outlives_usr1_and_a_run_outlives_its_service(tmp_path: Path) -> None:
    """A launcher sends its signals to every process of a task; and a service can die."""
    (tmp_path / "script.py").write_text(
        "import contextlib, dataclasses, psutil, signal, sys, time\n"
        "from pathlib import Path\n"
        "from megatron_btx.recipe.load import load_recipe\n"
        "from megatron_btx.recipe.schema import WandB\n"
        "from megatron_btx.train import tracking\n"
        "recipe = load_recipe(sys.argv[1])\n"
        "recipe = dataclasses.replace(recipe, wandb=WandB(mode='offline'))\n"
        "tracker = tracking.Tracker(recipe, 'seed', Path('.'), {})\n"
        "def is_service(child):\n"
        "    with contextlib.suppress(psutil.Error):  # others have ended meanwhile\n"
        "        return 'wandb-core' in ' '.join(child.cmdline())\n"
        "children = psutil.Process().children(recursive=True)\n"
        "(service,) = filter(is_service, children)\n"
        "service.send_signal(signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "tracker.log({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "if sys.argv[2] == 'dies':\n"
        "    service.terminate()\n"
        "    service.wait()\n"
        "    for step in range(2, 20):\n"
        "        tracker.log({'kind': 'train', 'step': step, 'loss': 1.0})\n"
        "        time.sleep(0.05)\n"
        "tracker.close()\n"
    )
    for case in ("lives", "dies"):
        directory = tmp_path / case
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, "../script.py", str(ROOT / "examples/tiny/recipe.yaml"), case],
            cwd=directory,
            env=environ({"HOME": str(directory)}),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert ("W&B has failed" in done.stderr) == (case == "dies"), done.stderr
        if case == "lives":
            assert logged(directory)[1][1]["train/loss"] == 1.0


def test_kill_9_leaves_no_service_and_no_scratch(tmp_path: Path) -> None:
    """W&B's service is a process of its own, in a session of its own, with files of its own."""
    recipe = write_small(tmp_path)
    text = recipe.read_text().replace("mode: disabled", "mode: offline")
    recipe.write_text(text.replace("seed: {tokens: 6144,", "seed: {tokens: 6M,"))
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    run = subprocess.Popen(
        command("run", "recipe.yaml"),
        cwd=tmp_path,
        env=environ({"TMPDIR": str(scratch), "BTX_TEST_RUN": str(tmp_path)}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "runs" / "small" / "seed" / "metrics.jsonl"
    wait(lambda: len(read(log)) > 3)
    wait(lambda: any("wandb-core" in word for word in words(ours(tmp_path))))
    run.kill()
    run.wait()
    wait(lambda: not ours(tmp_path))
    wait(lambda: not list(scratch.iterdir()))


def ours(directory: Path) -> list[psutil.Process]:
    """Everything alive that this test has started, wherever it hangs now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ().get("BTX_TEST_RUN")
            if environment == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def words(processes: list[psutil.Process]) -> list[str]:
    """Of their command lines; one that has ended meanwhile has none."""
    found: list[str] = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += process.cmdline()
    return found


def wait(condition: Callable[[], bool], timeout: float = 600) -> None:
    """Until it holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "environment",
    [
        {"WANDB_INIT_TIMEOUT": "60s"},
        {"WANDB_BASE_URL": "http://127.0.0.1:port", "WANDB_API_KEY": "0" * 40},
    ],
)
def test_whatever_is_wrong_with_it_training_goes_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(ROOT / "examples/tiny/recipe.yaml")
    recipe = dataclasses.replace(recipe, wandb=WandB(mode="online"))
    tracker = Tracker(recipe, "seed", tmp_path, {})
    tracker.log({"kind": "train", "step": 1, "loss": 1.0})
    tracker.close()
    assert "W&B has failed" in caplog.text


def test_an_artifact_that_is_not_there_costs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import dataclasses, sys\n"
        "from pathlib import Path\n"
        "from megatron_btx.recipe.load import load_recipe\n"
        "from megatron_btx.recipe.schema import WandB\n"
        "from megatron_btx.train import tracking\n"
        "recipe = load_recipe(sys.argv[1])\n"
        "recipe = dataclasses.replace(recipe, wandb=WandB(mode='offline'))\n"
        "tracker = tracking.Tracker(recipe, 'finetune', Path('.'), {})\n"
        "tracker.use(tracking.artifacts(recipe, ['mix', 'seed'], Path('nowhere')))\n"
        "tracker.log({'kind': 'train', 'step': 1, 'loss': 1.0})\n"
        "tracker.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py", str(ROOT / "examples/tiny/recipe.yaml")],
        cwd=tmp_path,
        env=environ({"HOME": str(tmp_path)}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("not in W&B's lineage") == 2
    assert logged(tmp_path)[1][1]["train/loss"] == 1.0
