"""A finished run of the demo recipe, made up: the shapes of real curves without the training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from megatron_btx.pipeline import graph, state
from megatron_btx.recipe import count, stages
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "recipe.yaml"
DOMAINS = ("general", "code", "math", "prose")
SEED_LOSS = {"general": 3.41, "code": 2.63, "math": 1.52, "prose": 3.64}
FINAL = {
    "seed": SEED_LOSS,
    "expert:code": {"general": 3.62, "code": 2.31, "math": 1.83, "prose": 3.97},
    "expert:math": {"general": 3.88, "code": 3.24, "math": 1.18, "prose": 4.21},
    "expert:prose": {"general": 3.47, "code": 3.02, "math": 1.97, "prose": 3.38},
    "dense": {"general": 3.36, "code": 2.39, "math": 1.27, "prose": 3.47},
    "btx": {"general": 3.33, "code": 2.36, "math": 1.25, "prose": 3.44},
}


def make_run(directory: Path, upto: int = 99) -> tuple[Recipe, Path]:
    """Write a run directory whose first ``upto`` stages are done."""
    chance = random.Random(7)
    run_dir = directory / "demo"
    file = directory / "recipe.yaml"
    file.write_text(f"base: {DEMO}\nrun_dir: {run_dir}\n")
    recipe = load_recipe(file)
    flops: dict[str, float] = {}
    run_dir.mkdir(exist_ok=True)
    for stage in graph.build(recipe)[:upto]:
        state.claim(run_dir, stage)
        path = run_dir / stage.directory
        state.begin(path, 1, stage.world_size)
        outputs: dict[str, Any] = {}
        if stage.kind in graph.TRAINED:
            flops[stage.name] = stages.flops(recipe, stage.name)
            records = _records(recipe, stage.name, chance)
            text = "".join(json.dumps(record) + "\n" for record in records)
            (path / "metrics.jsonl").write_text(text)
        if stage.kind == "prepare":
            part = {"documents": 2345, "tokens": 3_456_789}
            outputs["domains"] = {name: {"train": part, "valid": part} for name in DOMAINS}
        if stage.kind == "export":
            outputs["loss"] = {"transformers": 2.5951234, "megatron": 2.5951231, "difference": 3e-7}
        state.finish(path, stage, outputs)
        done = json.loads((path / "done.json").read_text())
        done |= {
            "seconds": 20 + chance.random() * 140,
            "finished": 1.8e9,
            "code_revision": "0a1b2c",
        }
        state.write_json(path / "done.json", done)
        if stage.kind == "evaluate":
            state.write_json(run_dir / "results.json", results(recipe, flops))
    return recipe, run_dir


def results(recipe: Recipe, flops: dict[str, float]) -> dict[str, Any]:
    """``results.json`` of the losses above."""
    experts = [name for name in FINAL if name.startswith("expert:")]
    spent = {name: flops[name] for name in ("seed", *experts, "dense")}
    spent["btx"] = sum(flops[name] for name in experts) + flops["finetune"]
    systems = {}
    for name, loss in FINAL.items():
        mean = sum(loss.values()) / len(loss)
        tokens = 12e6 if name == "seed" else 3e6 if name in experts else 11e6
        total, active = (734_000, 532_000) if name == "btx" else (316_000, 316_000)
        systems[name] = {
            "loss": {**loss, "mean": mean},
            "train_tokens": int(tokens),
            "train_flops": spent[name],
            "params_total": total,
            "params_active": active,
            "inference_flops_per_token": 2 * active,
            "stages": {name: {"tokens": int(tokens), "flops": spent[name]}},
        }
    text = {
        name: {"tokens": 65536, "sha256": f"{number:064x}"} for number, name in enumerate(DOMAINS)
    }
    return {"recipe": recipe.name, "domains": list(DOMAINS), "text": text, "systems": systems}


def _records(recipe: Recipe, name: str, chance: random.Random) -> list[dict[str, Any]]:
    training = graph.training(recipe, name)
    steps = count.steps(training, recipe.model)
    a_step = training.global_batch_size * recipe.model.seq_length
    begin = dict.fromkeys(DOMAINS, 6.93) if name == "seed" else SEED_LOSS
    system = "btx" if name == "finetune" else name
    if name == "finetune":
        begin = {domain: loss + 0.11 for domain, loss in SEED_LOSS.items()}
    weights = count.mixture(training.data) or dict.fromkeys(DOMAINS, 0.25)
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "total_steps": steps, "attempt": 1, "time": 1.8e9}
    ]
    for step in range(1, steps + 1):
        gone = 1 - math.exp(-7 * step / steps)
        now = {d: begin[d] + (FINAL[system][d] - begin[d]) * gone for d in DOMAINS}
        loss = sum(now[domain] * weight for domain, weight in weights.items())
        record = {
            "kind": "train",
            "step": step,
            "tokens": step * a_step,
            "loss": loss + chance.gauss(0, 0.06),
            "lr": 1e-3,
            "grad_norm": 0.7 + chance.random() / 4,
            "tokens_per_second": 30_000 * (0.9 + chance.random() / 5),
            "time": 1.8e9 + step / 3,
        }
        records.append(record)
        if step % max(1, steps // 6) == 0 or step == steps:
            mean = sum(now.values()) / len(now)
            evaluation = {"kind": "eval", "step": step, "loss": {**now, "mean": mean}}
            if name == "finetune":
                evaluation |= _routing(recipe, chance)
            records.append(evaluation)
    return records


def _routing(recipe: Recipe, chance: random.Random) -> dict[str, Any]:
    load, gate = {}, {}
    for domain in DOMAINS:
        load[domain], gate[domain] = [], []
        for layer in range(recipe.model.num_layers):
            own = 0.4 + 0.45 * layer
            raw = [
                math.exp(
                    chance.gauss(0, 0.25)
                    + own * (expert == domain or (expert == "seed" and domain == "general"))
                )
                for expert in recipe.model_names
            ]
            load[domain].append([value / sum(raw) for value in raw])
            sharp = [value**1.4 for value in raw]
            gate[domain].append([value / sum(sharp) for value in sharp])
    return {"load": load, "gate": gate}


if __name__ == "__main__":
    import sys

    from megatron_btx.report import page

    page.write(*make_run(Path(sys.argv[1])))
