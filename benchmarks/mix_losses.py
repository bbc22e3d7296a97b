"""Held-out loss right after each mix, before any finetuning, of the models of a finished run.

    python benchmarks/mix_losses.py runs/demo

Mixes the run's experts and seed in every way of the table (docs/mixing.md) into a temporary folder,
computes each result's loss with ``transformers`` on the first held-out sequences of every domain,
and prints a line a mix: nats a token per domain and their mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from megatron_btx.mix import offline
from megatron_btx.mix.command import Request

MIXES: dict[str, dict[str, object]] = {
    "seed": {"method": "copy"},
    "average": {"method": "average"},
    "btx": {},
    "btx, fold_norms": {"fold_norms": True},
    "btx, dare 0.5": {"dare": 0.5},
    "btx, router zeros": {"router_init": "zeros"},
    "btx, router normal(0.2)": {"router_init_std": 0.2},
    "blend": {"method": "blend", "moe_router_topk": 4, "router_init": "zeros"},
    "split in 2, top-4": {"method": "split", "num_chunks": 2, "moe_router_topk": 4},
}


def main() -> None:
    """A line a mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--sequences", type=int, default=64, help="of each domain")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    stages = [*sorted(options.run_dir.glob("expert-*")), options.run_dir / "seed"]
    sources = tuple(
        f"{stage.name.removeprefix('expert-')}={sorted((stage / 'checkpoints').glob('step_*'))[-1]}"
        for stage in stages
    )
    data = sorted((options.run_dir / "prepare" / "data").glob("*/valid.bin"))
    with tempfile.TemporaryDirectory() as folder:
        for at, (name, asked) in enumerate(MIXES.items()):
            out = Path(folder) / str(at)
            given = sources[-1:] if asked.get("method") == "copy" else sources
            request = Request(sources=given, out=str(out), **asked)  # type: ignore[arg-type]
            with open("/dev/null", "w", encoding="utf-8") as nowhere:
                offline.run(request, nowhere)
            losses = {path.parent.name: loss(out, path, options.sequences) for path in data}
            losses["mean"] = sum(losses.values()) / len(losses)
            rounded = {domain: round(value, 4) for domain, value in losses.items()}
            sys.stdout.write(f"{name:24} {json.dumps(rounded)}\n")
            sys.stdout.flush()


@torch.no_grad()
def loss(model_dir: Path, tokens_file: Path, sequences: int) -> float:
    """Mean negative log-likelihood of the file's first whole sequences, nats a token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    length = model.config.max_position_embeddings
    tokens = np.memmap(tokens_file, dtype=np.uint16, mode="r")
    count = min(sequences, (len(tokens) - 1) // length)
    flat = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
    total = 0.0
    for start in range(0, count * length, length):
        row = flat[start : start + length + 1]
        logits = model(row[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    return total / (count * length)


if __name__ == "__main__":
    main()
