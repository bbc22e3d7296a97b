"""A small run on text of its own, for tests of the command line: two domains of made-up JSONL
files, one expert, stages of seconds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.train.metrics import read

ROOT = Path(__file__).resolve().parents[1]

FAKE_KEY = "0badc0de" * 5
"""Of the form of a W&B key."""

RECIPE = """
name: small
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  seq_length: 64
tokenizer: {vocab_size: 400}
domains:
  web: {train: data/web.jsonl, valid: data/web-valid.jsonl}
  math: {train: data/math.jsonl}
training:
  global_batch_size: 8
  micro_batch_size: 4
  lr: 2e-3
  lr_warmup_iters: 2
  precision: fp32
  save_interval: 4
  eval_interval: 4
  eval_tokens: 512
seed: {tokens: 6144, data: {web: 1}}
experts:
  math: {tokens: 2048, data: {math: 0.9, web: 0.1}}
finetune: {tokens: 2048, data: {math: 1, web: 1}}
evaluate: {tokens: 512, micro_batch_size: 4}
export: {format: none}
wandb: {mode: disabled}
"""


def write_small(directory: Path) -> Path:
    """``recipe.yaml`` and its text in ``directory``; the recipe's path."""
    data = directory / "data"
    data.mkdir(parents=True, exist_ok=True)
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8)))
             for _ in range(300)]  # fmt: skip

    def prose() -> str:
        return " ".join(draw.choices(words, k=60)) + "."

    def sums() -> str:
        pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(20)]
        return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)

    for name, make, many in (
        ("web", prose, 150),
        ("web-valid", prose, 20),
        ("math", sums, 400),
    ):
        lines = [json.dumps({"text": make()}) for _ in range(many)]
        (data / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return directory / "recipe.yaml"


def btx(
    *arguments: str | Path,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environ(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(*arguments: str | Path) -> list[str]:
    """``btx`` with these arguments."""
    return [sys.executable, "-m", "megatron_btx.cli", *map(str, arguments)]


def environ(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would speak to W&B or colour the output."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), **(more or {})}


def tree_hash(directory: Path) -> str:
    """Hash of every name, link and byte under a directory."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(f"{path.relative_to(directory)}\0".encode())
        if path.is_symlink():
            digest.update(os.readlink(path).encode())
        elif path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@dataclass(frozen=True)
class Exported:
    """A seed and an expert branched from it, trained by a run of its own."""

    directory: Path
    """Where its recipe is."""

    @property
    def output(self) -> str:
        """What both of its starts said, the first of which was interrupted."""
        return (self.directory / "output.txt").read_text()

    @property
    def run_dir(self) -> Path:
        """Where its stages are."""
        return self.directory / "runs" / "small"


def export(directory: Path) -> None:
    """Train them: the seed under TP2, stopped by Ctrl-C on the way, a foreign `apex` installed, and
    W&B asked for without a key. Then a second start finishes them."""
    recipe = write_small(directory)
    text = recipe.read_text()
    seed = "seed: {tokens: 24576, layout: {tensor_model_parallel_size: 2}, data: {web: 1}}"
    text = text.replace("seed: {tokens: 6144, data: {web: 1}}", seed)
    recipe.write_text(text.replace("mode: disabled", "mode: online"))
    foreign = directory / "site" / "apex"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise ImportError('a web framework of another age')")
    home = directory / "home"
    home.mkdir()
    arguments = ("run", "recipe.yaml", "--stop-after", "expert:math")
    environment = {
        **environ({"HOME": str(home)}),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{foreign.parent}",
    }
    seed = directory / "runs" / "small" / "seed"
    while True:
        first = subprocess.Popen(
            command(*arguments),
            cwd=directory,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 600
        while sum(record["kind"] == "train" for record in read(seed / "metrics.jsonl")) < 3:
            assert first.poll() is None, first.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate(timeout=600)
        if not (seed / "done.json").exists():
            break
        shutil.rmtree(seed.parent)  # it was done before its moment came: from the beginning
    assert first.returncode == 130, output
    second = btx(*arguments, cwd=directory, environment=environment)
    assert second.returncode == 0, second.stdout + second.stderr
    (directory / "output.txt").write_text(output + second.stderr + second.stdout)
