"""Damaged files of every kind: one clear error with file and fix, exit code 2, the tree unchanged,
within seconds and bounded memory; or the command does what it was asked to.

A case is (what is damaged, seed); tests/fuzz.py says how. One that ever failed stays in ``KEPT``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import re
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.families.export import write_hf
from megatron_btx.families.tokenizer_files import tokenizer_files
from megatron_btx.files import write_json
from megatron_btx.mix.one_model import copy
from megatron_btx.pipeline import graph, state
from megatron_btx.recipe.load import load_recipe
from megatron_btx.train.metrics import MetricsLog
from tests.evaluate.made import random_model, tokenizer, write_megatron
from tests.fuzz import damage
from tests.small import tree_hash, write_small

SECONDS, BYTES = 5, 1_000_000_000
CASES = int(os.environ.get("BTX_FUZZ", "26"))
"""Of each of the sixteen targets: 416 in all. ``BTX_FUZZ=1000`` searches for an hour."""
KEPT: dict[str, tuple[int, ...]] = {
    "config": (271,),
    "manifest": (110,),
    "options": (72,),
    "done": (95,),
    "metrics": (83,),
}
"""Seeds beyond ``range(CASES)`` that failed once."""

SET = "method: posterior\nmodels:\n  a: hf\n  b: megatron\n"

Command = Callable[[Path], list[str]]


def _copies(form: str) -> Command:
    return lambda here: ["mix", "--method", "copy", "--sources", f"a={here / form}", "--out", "out"]


def _recipe(*words: str) -> Command:
    return lambda here: [words[0], "recipe.yaml", *words[1:]]


TARGETS: dict[str, tuple[str, Command]] = {
    "config": ("hf/config.json", _copies("hf")),
    "header": ("hf/model.safetensors", _copies("hf")),
    "index": ("sharded/model.safetensors.index.json", _copies("sharded")),
    "tokenizer.json": ("hf/tokenizer.json", _copies("hf")),
    "tokenizer.model": ("hf/tokenizer.model", _copies("hf")),
    "tokenizer_config": ("hf/tokenizer_config.json", _copies("hf")),
    "manifest": ("megatron/manifest.json", _copies("megatron")),
    "metadata": ("megatron/.metadata", _copies("megatron")),
    "distcp": ("megatron/__0_0.distcp", _copies("megatron")),
    "common": ("megatron/common.pt", _copies("megatron")),
    "recipe": ("recipe.yaml", _recipe("plan")),
    "options": ("mix.yaml", lambda here: ["mix", "--config", "mix.yaml", "--dry-run"]),
    "set": ("set.yaml", lambda here: ["centroids", "set.yaml", "--data", "a=b", "--out", "out"]),
    "done": ("runs/small/seed/done.json", _recipe("run", "--dry-run")),
    "metrics": ("runs/small/seed/metrics.jsonl", _recipe("report")),
    "progress": ("runs/small/finetune/progress.json", _recipe("status")),
}
"""The file that is damaged, and the command that reads it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of every kind, all of them good."""
    root = tmp_path_factory.mktemp("whole")
    spoken = tokenizer()
    plan = copy(random_model(spoken, 1), dtype=torch.float32)
    write_megatron(plan, root / "megatron", spoken)
    files = functools.partial(tokenizer_files, root / "megatron", megatron=False)
    write_hf(plan, root / "hf", files=files)
    write_hf(plan, root / "sharded", shard=20_000)
    write_small(root)
    (root / "mix.yaml").write_text("sources: [a=hf, b=hf]\nout: out\n")
    (root / "set.yaml").write_text(SET)
    # A seed's damage is at the same place in every run only if the files are the same.
    with pytest.MonkeyPatch.context() as fixed:
        fixed.setattr(time, "time", lambda: 1_750_000_000.125)
        fixed.setattr(state, "code_revision", lambda: "0123456789ab")
        _run(root)
    return root


@pytest.mark.parametrize("target", TARGETS)
def test_whole_files_are_taken(
    target: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    code, said = _run_command(TARGETS[target][1](tmp_path / "here"))
    wanted = "is a set of models: it has no router" if target == "set" else ""
    assert (code, wanted in said) == (2 if wanted else 0, True), said


@pytest.mark.parametrize("target", TARGETS)
def test_one_clear_error_or_none(
    target: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = (*range(CASES), *KEPT.get(target, ()))
    wrong = []
    for seed in seeds:
        here = tmp_path / str(seed)
        shutil.copytree(whole, here, symlinks=True)
        done = damage(here / TARGETS[target][0], seed)
        monkeypatch.chdir(here)
        if problem := _problem(TARGETS[target][1](here), here):
            wrong.append(f"{target}, seed {seed} ({done}): {problem}")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(here)
    assert not wrong, f"{len(wrong)} of {len(seeds)}\n" + "\n\n".join(wrong)


def _problem(words: list[str], here: Path) -> str | None:
    """What is wrong with how a command met a damaged file."""
    before = tree_hash(here)
    try:
        with _bounded() as spent:
            code, said = _run_command(words)
    except Exception:
        return traceback.format_exc(limit=-3)
    found = {
        f"{spent.seconds:.1f} s": spent.seconds >= SECONDS,
        f"{spent.bytes} bytes": spent.bytes >= BYTES,
        f"exit {code}": code not in (0, 2),
        "a traceback": "Traceback" in said,
        "no error": code == 2 and "error:" not in said,
        "the tree has changed": code == 2 and tree_hash(here) != before,
        "control characters": bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", said)),
        f"{len(said)} characters": len(said) > 20_000,
    }
    what = [name for name, is_so in found.items() if is_so]
    return f"{', '.join(what)}: {said[-600:]!r}" if what else None


def _run(root: Path) -> None:
    """A run whose seed is done, with a step of metrics."""
    (stage,) = (s for s in graph.build(load_recipe(root / "recipe.yaml")) if s.name == "seed")
    directory = root / "runs" / "small" / "seed"
    directory.mkdir(parents=True)
    state.begin(directory, 1, 1)
    metrics = MetricsLog(directory / "metrics.jsonl", 0)
    for step in range(1, 4):
        metrics.write("train", step, loss=3.0 / step, lr=1e-3, tokens=512 * step)
    metrics.close()
    step = directory / "checkpoints" / "step_00000012"
    step.mkdir(parents=True)
    (step / ".metadata").touch()  # a dry run sees that there is one
    other = root / "runs" / "small" / "finetune"
    other.mkdir()
    state.begin(other, 1, 1)
    write_json(other / "progress.json", {"what": "reading", "done": 0.5})
    state.finish(directory, stage, {"checkpoint": "seed/checkpoints/step_00000012", "step": 12})


@dataclasses.dataclass
class Spent:
    """What a command took."""

    seconds: float = 0.0
    bytes: int = 0


@contextlib.contextmanager
def _bounded() -> Iterator[Spent]:
    """Seconds of CPU time, and by how much the peak of resident memory grew. What waits for ever
    (a pipe that nobody writes to) is ended, and what asks for far too much memory gets none."""

    def ended(_signal: int, _frame: object) -> None:
        raise AssertionError("no end within ten minutes")

    spent, former = Spent(), signal.signal(signal.SIGALRM, ended)
    signal.alarm(600)
    addresses = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * BYTES, addresses[1]))
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield spent
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, addresses)
        signal.signal(signal.SIGALRM, former)
        spent.seconds = time.process_time() - started
        spent.bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)


def _run_command(words: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as left:
            code = int(left.code or 0)
    return code, said.getvalue()
