"""Mixing at the speed of the disk: ``python benchmarks/mix.py --shape tinyllama --work DIR``.

Four random models of a shape in Hugging Face format become one Mixtral, by ``btx mix`` in a process
of its own. Beside it ``cat`` reads the same bytes and writes as many. Both are timed to the end of
a final sync, alternating; the report is one JSON line with the ratio of the best times, rates and
peak resident memory, mapped pages included. ``--mergekit COMMAND`` times mergekit-moe on the same
files, installed in an environment of its own (`pip install mergekit==0.1.5`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import fresh
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model

SHAPES = {
    "small": (512, 8, 1408, 8, 2, 32000),
    "tinyllama": (2048, 22, 5632, 32, 4, 32000),
    "llama-3b": (3200, 26, 8640, 32, 32, 32000),
    "llama-7b": (4096, 32, 11008, 32, 32, 32000),
}

TOKENIZER: dict[str, Any] = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    },
    "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
}

RUN = """
import argparse, sys
from megatron_btx.cli import mix
parser = argparse.ArgumentParser()
mix.add_parser(parser.add_subparsers())
options = parser.parse_args()
sys.exit(options.run(options))
"""


def main() -> None:
    """Make the models, run the rounds, print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--work", type=Path, required=True, help="where the models go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="", help="passed on to btx mix")
    parser.add_argument("--workers", default="2", help="passed on to btx mix")
    parser.add_argument("--links", action="store_true", help="sources are hard links of one model")
    parser.add_argument("--mergekit", default="", help="the command mergekit-moe")
    options = parser.parse_args()
    sources = make_sources(options.work, options.shape, options.links)
    runs: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        runs.append(timed("btx", btx_mix(sources, options), options.work))
        runs.append(timed("cat", cat(sources, options.work, runs[-1]["bytes"]), options.work))
        if options.mergekit:
            runs.append(timed("mergekit", mergekit(sources, options), options.work))
    best = {
        name: min((run for run in runs if run["name"] == name), key=lambda run: run["seconds"])
        for name in dict.fromkeys(run["name"] for run in runs)
    }
    ratios = {
        f"btx/{name}": round(best["btx"]["seconds"] / best[name]["seconds"], 3)
        for name in best
        if name != "btx"
    }
    sys.stdout.write(json.dumps({"shape": options.shape, "runs": runs, **ratios}) + "\n")


def make_sources(work: Path, shape: str, links: bool) -> list[Path]:
    """Four models, made once."""
    hidden, layers, ffn, heads, groups, vocabulary = SHAPES[shape]
    model = Model(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
    )
    architecture = Architecture(model=model, vocab_size=vocabulary)
    paths = [work / shape / name for name in ("code", "math", "prose", "seed")]
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if links and seed:
            shutil.copytree(paths[0], path, copy_function=os.link)
        else:
            write_hf(fresh(architecture, seed=seed, dtype=torch.bfloat16), path)
            for name, content in TOKENIZER.items():  # mergekit reads one
                (path / name).write_text(json.dumps(content))
    return paths


def btx_mix(sources: list[Path], options: argparse.Namespace) -> list[str]:
    """The mix, as a command."""
    words = [sys.executable, "-c", RUN, "mix", "--sources", *map(str, sources)]
    words += ["--out", str(options.work / "out"), "--workers", options.workers]
    return words + (["--memory", options.memory] if options.memory else [])


def cat(sources: list[Path], work: Path, nbytes: int) -> list[str]:
    """Read every byte of the sources, write as many as the mix wrote."""
    files = " ".join(str(file) for path in sources for file in sorted(path.glob("*.safetensors")))
    out = work / "out"
    # The mix writes less than it reads (what is averaged shrinks); so does this.
    return [
        "sh",
        "-c",
        f"mkdir {out} && cat {files} | tee /dev/null | head -c {nbytes} > {out}/all",
    ]


def mergekit(sources: list[Path], options: argparse.Namespace) -> list[str]:
    """The same mix by mergekit-moe."""
    config = {
        "base_model": str(sources[-1]),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": str(path), "positive_prompts": [""]} for path in sources],
    }
    path = options.work / "mergekit.yaml"
    path.write_text(json.dumps(config))
    consent = "--i-understand-this-is-not-useful-without-training"
    return [options.mergekit, str(path), str(options.work / "out"), consent]


def timed(name: str, words: list[str], work: Path) -> dict[str, Any]:
    """Seconds to the end of a sync, peak resident bytes of the process tree, bytes written."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.monotonic()
    process = psutil.Popen(words, stdout=subprocess.DEVNULL)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    code = process.wait()
    os.sync()
    seconds = time.monotonic() - start
    watcher.join()
    if code:
        raise SystemExit(f"{name} failed with exit code {code}")
    written = sum(file.stat().st_size for file in out.iterdir())
    rate = round(written / seconds / 1e9, 3)
    found = {"name": name, "seconds": round(seconds, 2), "bytes": written, "GB/s": rate}
    return {**found, "peak_MiB": peak[0] >> 20}


def watch(process: psutil.Popen, peak: list[int]) -> None:
    """The most that the process and its children had resident, mapped pages included."""
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peak[0] = max(peak[0], sum(one.memory_info().rss for one in tree))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.02)


if __name__ == "__main__":
    main()
