"""How time grows: ``python benchmarks/growth.py --work DIR`` prints a table of docs/benchmarks.md.

Each row is one command in a process of its own, on random models of hidden size 64 (a layer has
0.2 MB), at sizes that double; seconds are CPU time of the whole command, less that of an empty one
(importing torch), MB the most that a process of it had. ``--only files`` prints the rows of a
corpus alone. Growth is linear where the last column, the factor of a doubling, stays at 2 or below.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LAYERS = (20, 40, 80, 160, 320)
SOURCES = (8, 16, 32, 64)

MAIN = "import sys; from megatron_btx.cli.main import main; sys.exit(main())"
BTX = [sys.executable, "-c", MAIN]


def main() -> None:
    """Make the models and the text, run the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty directory")
    parser.add_argument("--only", choices=sorted(ROWS), help="these rows")
    options = parser.parse_args()
    nothing, _ = spent([sys.executable, "-c", "import megatron_btx.mix.offline"])
    print("| command | size | CPU s | MB | a doubling | ")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in ROWS.items():
        if options.only not in (None, name):
            continue
        before: dict[str, tuple[int, float]] = {}
        for command, size, words in rows(options.work):
            seconds, memory = spent(words)
            seconds = max(seconds - (nothing if name in WITH_TORCH else 0.0), 1e-3)
            last, ratio = before.get(command, (size, 0.0)), ""
            if last[0] < size and last[1] >= 0.1:
                ratio = f"{(seconds / last[1]) ** (1 / math.log2(size / last[0])):.1f}"
            row = f"| {command} | {size:,} {name} | {seconds:.1f} | {memory:.0f} | {ratio} |"
            print(row, flush=True)
            before[command] = (size, seconds)


def verify(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """``btx verify`` of an MoE of four experts, in both formats."""
    for form in ("megatron", "hf"):
        for layers in LAYERS:
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            sources = [model(work / f"{layers}-{label}", layers, seed) for seed, label in SEEDS]
            mix = ["mix", "--sources", *sources, "--format", form, "--out", str(out)]
            run([*BTX, *mix])
            yield f"`btx verify`, {form}", layers, [*BTX, "verify", str(out)]


def drift(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """``btx drift`` of models of four layers."""
    for count in SOURCES:
        paths = [model(work / f"drift-{at}", 4, at) for at in range(count)]
        yield "`btx drift`", count, [*BTX, "drift", "--sources", *paths, "--out", str(work / "d")]


SEEDS = tuple(enumerate(("code", "math", "prose", "seed")))


def model(path: Path, layers: int, seed: int) -> str:
    """A random model in Hugging Face format, made once."""
    import torch

    from megatron_btx.families.export import write_hf
    from megatron_btx.mix.one_model import fresh
    from megatron_btx.recipe.architecture import Architecture
    from megatron_btx.recipe.schema import Model

    shape = Model(num_layers=layers, hidden_size=64, ffn_hidden_size=192, num_attention_heads=4)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_hf(
            fresh(Architecture(model=shape, vocab_size=512), seed=seed, dtype=torch.bfloat16), path
        )
    return str(path)


def corpus(work: Path) -> Iterator[tuple[str, int, list[str]]]:
    """What a run asks of a domain of many small files, before it is prepared, then, and after."""
    for count in FILES:
        place = work / f"files-{count}"
        (place / "text").mkdir(parents=True)
        for number in range(count):
            documents = [
                f"{number} {each} " + "some words of a document " * 20 for each in range(3)
            ]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (place / "text" / f"{number:06}.jsonl").write_text(lines)
        recipe = place / "recipe.yaml"
        recipe.write_text(RECIPE.format(run=place / "run", text=place / "text"))
        check = [*BTX, "run", str(recipe), "--dry-run"]
        prepare = [*BTX, "run", str(recipe), "--stop-after", "prepare"]
        yield "`btx plan`", count, [*BTX, "plan", str(recipe)]
        yield "hashes (`btx run --dry-run`)", count, check
        yield "`prepare` with its checks", count, prepare
        yield "hashes, known", count, check
        yield "what is left, when all is done", count, prepare


FILES = (100, 1_000, 10_000)
RECIPE = """\
name: growth
run_dir: {run}
model:
  {{num_layers: 1, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, seq_length: 32}}
tokenizer: {{vocab_size: 300, train_bytes: 100_000}}
domains: {{a: {{train: [{text}]}}}}
training: {{global_batch_size: 1, precision: fp32}}
seed: {{tokens: 32, data: {{a: 1}}}}
experts: {{a: {{tokens: 32}}}}
finetune: {{tokens: 32, data: {{a: 1}}}}
"""
ROWS = {"files": corpus, "layers": verify, "sources": drift}
"""A command has this process's memory until it begins: first what is small."""
WITH_TORCH = ("layers", "sources")
"""Rows whose commands import torch, which is left out."""


def spent(words: list[str]) -> tuple[float, float]:
    """CPU seconds of a command, its children included, and the most memory (MB) that one had."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def run(words: list[str]) -> None:
    """One command, quietly, on one thread."""
    spent(words)


if __name__ == "__main__":
    main()
