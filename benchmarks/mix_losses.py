"""Held-out loss and load right after each mix, before any finetuning, of a finished run's models.

    python benchmarks/mix_losses.py runs/demo
    python benchmarks/mix_losses.py runs/demo --table routers

Mixes the run's experts and seed in every way of one of the tables in docs/mixing.md into a
temporary folder and computes each result with ``transformers`` on the first held-out sequences of
every domain. A line a mix: nats a token per domain and their mean; of an MoE the share of the
choices that go to the expert of the text's own domain (mean over the domains that have one, and the
layers), and the largest and smallest share of any expert in a layer over all text together.
Centroids are made as `btx centroids` makes them, from training text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from megatron_btx.data.heldout_sequences import HeldOutText
from megatron_btx.engine import distributed
from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.schema import Layout

MIXES: dict[str, dict[str, Any]] = {
    "seed": {"method": "copy"},
    "average": {"method": "average"},
    "average by tokens": {"method": "average", "average": ("tokens",)},
    "average, dare 0.5": {"method": "average", "dare": 0.5},
    "btx": {},
    "btx, fold_norms": {"fold_norms": True},
    "btx, by tokens": {"average": ("tokens",)},
    "btx, dare 0.5": {"dare": 0.5},
    "blend": {"method": "blend", "moe_router_topk": 4, "router_init": "zeros"},
    "split in 2, top-4": {"method": "split", "num_chunks": 2, "moe_router_topk": 4},
    "upcycle": {"method": "upcycle", "copies": 4},
    "upcycle, noise 0.01": {"method": "upcycle", "copies": 4, "noise": 0.01},
    "upcycle, drop 0.5": {"method": "upcycle", "copies": 4, "drop_ratio": 0.5},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "zeros": {"router_init": "zeros"},
    "normal(0.02)": {},
    "normal(0.2)": {"router_init_std": 0.2},
    "uniform(0.02)": {"router_init": "uniform"},
    "centroids, spread 0.3": {"router_init": "centroids", "centroids": 0.3},
    "centroids, spread 1": {"router_init": "centroids", "centroids": 1.0},
    "centroids, spread 3": {"router_init": "centroids", "centroids": 3.0},
    "ridge, as solved": {"router_init": "ridge", "centroids": None},
    "ridge, spread 0.3": {"router_init": "ridge", "centroids": 0.3},
    "ridge, spread 1": {"router_init": "ridge", "centroids": 1.0},
    "ridge, spread 3": {"router_init": "ridge", "centroids": 3.0},
}
TABLES = {"mixes": MIXES, "routers": ROUTERS}


def main() -> None:
    """A line a mix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--table", choices=TABLES, default="mixes")
    parser.add_argument("--sequences", type=int, default=64, help="of each domain")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    stages = [*sorted(options.run_dir.glob("expert-*")), options.run_dir / "seed"]
    names = [stage.name.removeprefix("expert-") for stage in stages]
    steps = [sorted((stage / "checkpoints").glob("step_*"))[-1] for stage in stages]
    sources = tuple(f"{name}={step}" for name, step in zip(names, steps, strict=True))
    data = sorted((options.run_dir / "prepare" / "data").glob("*/valid.bin"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for at, (mix, asked) in enumerate(TABLES[options.table].items()):
            out = folder / str(at)
            given = sources[-1:] if asked.get("method") in ("copy", "upcycle") else sources
            if "centroids" in asked:
                asked = {**asked, "centroids": centroids(folder, sources, names, data, asked)}
            with open(os.devnull, "w", encoding="utf-8") as nowhere:
                offline.run(MixRequest(sources=given, out=str(out), **asked), nowhere)
            line = measured(out, data, names, options.sequences)
            sys.stdout.write(f"{mix:24} {json.dumps(line)}\n")
            sys.stdout.flush()


@torch.no_grad()
def measured(out: Path, data: list[Path], names: list[str], sequences: int) -> dict[str, float]:
    """Losses of a result, and where its routers send each domain."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    found: dict[str, float] = {}
    shares: dict[str, Tensor] = {}
    for path in data:
        domain = path.parent.name
        found[domain], shares[domain] = loss(model, path, sequences)
    found["mean"] = sum(found.values()) / len(found)
    experts = getattr(model.config, "btx_experts", None)
    if experts:
        homes = {domain: names.index(domain) for domain in shares if domain in names}
        if list(experts) == names and homes:
            own = [shares[domain][:, home].mean().item() for domain, home in homes.items()]
            found["own"] = sum(own) / len(own)
        every = torch.stack(list(shares.values())).mean(0)
        found |= {"largest": every.max().item(), "smallest": every.min().item()}
    return {name: round(value, 4) for name, value in found.items()}


def loss(model: Any, tokens_file: Path, sequences: int) -> tuple[float, Tensor]:
    """Mean negative log-likelihood of the file's first whole sequences, nats a token; shares of the
    choices [layers, experts], empty of a dense model."""
    length = model.config.max_position_embeddings
    tokens = np.memmap(tokens_file, dtype=np.uint16, mode="r")
    count = min(sequences, (len(tokens) - 1) // length)
    flat = torch.from_numpy(tokens[: count * length + 1].astype(np.int64))
    is_moe = hasattr(model.config, "num_local_experts")
    total, chosen = 0.0, torch.zeros(0)
    for start in range(0, count * length, length):
        row = flat[start : start + length + 1]
        output = model(row[None, :-1], **({"output_router_logits": True} if is_moe else {}))
        total += torch.nn.functional.cross_entropy(
            output.logits[0], row[1:], reduction="sum"
        ).item()
        if is_moe:
            logits = torch.stack(output.router_logits).float()
            picked = logits.topk(model.config.num_experts_per_tok).indices
            picks = torch.nn.functional.one_hot(picked, logits.shape[-1]).sum((1, 2)).float()
            chosen = picks if not len(chosen) else chosen + picks
    shares = chosen / chosen.sum(-1, keepdim=True) if is_moe else chosen
    return total / (count * length), shares


def centroids(
    folder: Path, sources: tuple[str, ...], names: list[str], data: list[Path], asked: Mapping
) -> str:
    """The file of `btx centroids` for this rule and spread: 16384 training tokens of each domain,
    for the seed of the domain that no expert has."""
    from megatron_btx.evaluate.centroids import as_file, routers
    from megatron_btx.evaluate.router_init_rows import centroid_rows, ridge_rows
    from megatron_btx.mix.plans import open_sources, plan_of

    if not torch.distributed.is_initialized():
        os.environ["BTX_INIT_METHOD"] = f"file://{folder / 'ranks'}"
        distributed.initialize(Layout(), 0)
    request = MixRequest(sources=sources, router_init="zeros", dtype="fp32")
    plan = plan_of(*open_sources(request))
    length = plan.architecture.model.seq_length
    other = next(path.parent for path in data if path.parent.name not in names)
    texts = {
        name: HeldOutText(
            [(other if name == "seed" else other.with_name(name)) / "train"], length, 16384
        )
        for name in names
    }
    kind, spread = asked["router_init"], asked["centroids"]
    found = routers(
        plan,
        texts,
        layout=Layout(),
        precision="fp32",
        rule=ridge_rows if kind == "ridge" else centroid_rows,
        gram=kind == "ridge",
        spread=spread,
        micro_batch_size=8,
    )
    path = folder / f"{kind}-{spread}.safetensors"
    path.write_bytes(as_file(found.rows, names, kind))
    return str(path)


if __name__ == "__main__":
    main()
