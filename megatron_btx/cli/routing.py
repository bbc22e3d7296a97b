"""``btx routing``: where the router of runs and checkpoints sends which text, as in the paper's
figures 3 to 6 (arXiv 2403.07816). Imports no torch."""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_btx.cli.evaluate import (
    add_how,
    check_numbers,
    columns,
    data_of,
    layout_of,
    setting_of,
)
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.sample_top1_mode import expert_choice, in_words
from megatron_btx.files import check_directory, find_json, written
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report.style import sheet
from megatron_btx.report.svg import heatmap
from megatron_btx.train import metrics

Matrix = list[list[float]]
"""``[layer][expert]``."""

DEAD = 0.01
"""An expert that gets less than this share of the choices is called dead."""

_EPILOG = """examples:
  btx routing runs/demo                          before and after its finetuning
  btx routing runs/demo runs/demo-no-balance     with and without the balance loss, side by side
  btx routing runs/demo/finetune HF_MIXTRAL --data code=code.jsonl web=web.jsonl
  btx routing runs/demo --out routing --wandb offline

A run has measured its routing on its own held-out text while it trained: nothing is computed. A
checkpoint (a step or stage directory, a Hugging Face model) is measured on --data."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The routing of one model at one moment."""

    name: str
    moment: str
    """``before finetuning``, ``after finetuning``, or ``as it is`` of a checkpoint."""
    balance_loss_coeff: float | None
    """Of the finetuning; ``None`` where it is not known."""
    experts: list[str]
    load: dict[str, Matrix]
    """Domain -> share of the choices; rows sum to one."""
    gate: dict[str, Matrix]
    """Domain -> mean gate, likewise."""
    expert_choice: str | None = None
    """Of Sample Top-1 (evaluate/sample_top1_mode.py)."""

    @property
    def title(self) -> str:
        """For people."""
        alpha, said = self.balance_loss_coeff, [self.name, self.moment]
        if alpha is not None:
            said.append(f"balance loss {alpha:g}" if alpha else "no balance loss")
        if self.expert_choice is not None:
            said.append(in_words(self.expert_choice))
        return ", ".join(said)

    def dead(self) -> dict[str, list[int]]:
        """Dead experts and the layers (from 1) in which they are: less than ``DEAD`` of the
        choices, mean over the domains."""
        found: dict[str, list[int]] = {}
        for layer, shares in enumerate(over_domains(self.load), 1):
            for expert, share in zip(self.experts, shares, strict=True):
                if share < DEAD:
                    found.setdefault(expert, []).append(layer)
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it, the dead named."""
        return {**asdict(self), "dead": self.dead(), "layers": len(over_domains(self.load))}


def add_parser(commands: Any) -> None:
    """Add ``routing`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "routing",
        help="where the router sends which text: shares, gates, dead experts",
        description="Where the router of runs and checkpoints sends which text.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources", metavar="RUN_DIR|CHECKPOINT", nargs="+", help="runs, or models with experts"
    )
    parser.add_argument(
        "--data",
        metavar="NAME=FILE[,FILE]",
        nargs="+",
        action="extend",
        default=[],
        help="text to measure checkpoints on",
    )
    add_how(parser)
    parser.add_argument("--tokens", metavar="N", type=int, help="of each text, at most (all)")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="of the JSONL (text)")
    parser.add_argument("--seq-length", metavar="N", type=int, help="tokens of a sequence")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write routing.json and .html")
    parser.add_argument(
        "--wandb", choices=["offline", "online"], help="log table and page to Weights & Biases"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    check_numbers(options)
    if options.out is not None:
        check_directory(options.out)
    runs = [Path(source) for source in options.sources if _is_run(Path(source))]
    others = [source for source in options.sources if not _is_run(Path(source))]
    subjects = model_spec.parse(others)
    if subjects and not options.data:
        raise UserError(others[0], "is a checkpoint", "say on what to measure it: --data NAME=FILE")
    views = [view for run_dir in runs for view in of_run(run_dir)]
    if subjects:
        try:
            views += _measured(subjects, options)
        except eval_ranks.Ended as ended:
            return ended.code
    if not views:  # a rank that is not the first
        return 0
    text = json.dumps([view.as_json() for view in views]) + "\n"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for name, content in (("routing.json", text), ("routing.html", page(views))):
            with written(options.out / name) as file:
                file.write(content)
    if options.wandb is not None:
        _log(views, options.wandb, options.out or Path())
    sys.stdout.write(text if options.json else "\n".join(map(table, views)))
    if options.out is not None and not options.json:
        sys.stdout.write(f"page: {options.out / 'routing.html'}\n")
    return 0


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def of_run(run_dir: Path) -> list[View]:
    """What a run's finetuning measured: before its first step, and at its end; the end by the final
    evaluation, where there has been one.

    Raises:
        UserError: it has no finetuning, or that has not begun.
    """
    recipe = load_recipe(run_dir / "recipe.yaml")
    records = metrics.read(run_dir / "finetune" / "metrics.jsonl")
    evals = [record for record in records if record.get("load")]
    if not evals:
        raise UserError(
            str(run_dir), "has measured no routing", "finetune its MoE first: btx run RECIPE"
        )
    moments: list[tuple[str, Mapping[str, Any]]] = []
    if evals[0]["step"] == 0:
        moments.append(("before finetuning", evals[0]))
    if evals[-1]["step"] > 0:
        total = max((r.get("total_steps", 0) for r in records), default=0)
        step = evals[-1]["step"]
        moment = "after finetuning" if step >= total else f"after {step} of {total} steps"
        moments.append((moment, _final(run_dir, evals[-1]) if step >= total else evals[-1]))
    return [_view(recipe, moment, record) for moment, record in moments]


def _final(run_dir: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    systems = (find_json(run_dir / "results.json") or {}).get("systems", {})
    return next((system for system in systems.values() if system.get("load")), record)


def _view(recipe: Recipe, moment: str, record: Mapping[str, Any]) -> View:
    return View(
        name=recipe.name,
        moment=moment,
        balance_loss_coeff=recipe.routing.balance_loss_coeff,
        experts=list(record.get("experts") or recipe.expert_names),
        load=dict(record["load"]),
        gate=dict(record.get("gate") or {}),
        expert_choice=expert_choice(recipe.routing),
    )


def _measured(subjects: list[Subject], options: argparse.Namespace) -> list[View]:
    sets = [one.name for one in subjects if one.method is not None]
    if sets:
        raise UserError(sets[0], "is a set of models: it has no router", "give one model")
    asked = eval_ranks.request_of(
        "routing",
        subjects,
        layout_of(options.layout),
        data=data_of(options.data),
        setting=setting_of(options) | {"tokens": options.tokens},
    )
    found = eval_ranks.answer(asked) or {}
    return [
        View(name=name, moment="as it is", balance_loss_coeff=None, **one)
        for name, one in found.items()
    ]


def over_domains(measured: Mapping[str, Matrix]) -> Matrix:
    """Mean over the domains, each counting the same."""
    matrices = list(measured.values())
    return [
        [sum(cell) / len(cell) for cell in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def table(view: View) -> str:
    """Share of the choices and mean gate, in percent, for each domain, layer and expert."""
    head = ["domain", "layer", *view.experts, *(f"gate {name}" for name in view.experts)]
    rows = []
    for domain, load in view.load.items():
        gate = view.gate.get(domain, load)
        for layer, (shares, gates) in enumerate(zip(load, gate, strict=True), 1):
            cells = [f"{100 * value:.1f}" for value in (*shares, *gates)]
            rows.append([domain, str(layer), *cells])
    return f"{view.title} (%)\n{columns(head, rows)}{words(view)}\n"


def words(view: View) -> str:
    """Whom each domain prefers, and who is dead."""
    said = []
    for domain, load in view.load.items():
        means = [sum(column) / len(column) for column in zip(*load, strict=True)]
        best = max(range(len(means)), key=means.__getitem__)
        said.append(f"{domain} to {view.experts[best]} ({means[best]:.0%})")
    text = "Over all layers, most choices go on " + ", on ".join(said) + ".\n"
    layers = len(over_domains(view.load))
    for expert, where in view.dead().items():
        place = (
            "in every layer" if len(where) == layers else "in layer " + ", ".join(map(str, where))
        )
        text += f"Dead {place} (below {DEAD:.0%} of the choices): {expert}.\n"
    return text if view.dead() else text + "No expert is dead in any layer.\n"


def page(views: Sequence[View]) -> str:
    """Heatmaps of every view, one scale for all shares and one for all gates; needs no network."""
    parts = []
    for key, label in (("load", "Share of the choices"), ("gate", "Mean gate")):
        matrices = [matrix for view in views for matrix in getattr(view, key).values()]
        top = max((value for matrix in matrices for row in matrix for value in row), default=0.0)
        parts.append(f"<h2>{label}</h2>")
        for view in views:
            pictures = "".join(
                f'<figure class="card"><h3>{html.escape(domain)}</h3>'
                + heatmap(
                    matrix,
                    rows=[str(layer + 1) for layer in range(len(matrix))],
                    columns=view.experts,
                    top=top,
                    name=f"{label} on {domain}: {view.title}",
                    row_label="layer",
                )
                + "</figure>"
                for domain, matrix in getattr(view, key).items()
            )
            said = f'<p class="soft">{html.escape(words(view))}</p>' if key == "load" else ""
            parts.append(f"<h3>{html.escape(view.title)}</h3>{said}")
            parts.append(f'<div class="panels small">{pictures}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Routing</title><style>{sheet()}</style></head>\n<body><main>\n"
        f"<h1>Where the tokens go</h1>{''.join(parts)}\n</main></body></html>\n"
    )


def _log(views: Sequence[View], mode: str, directory: Path) -> None:
    """One W&B run with every number and the page."""
    import wandb

    from megatron_btx.train import tracking

    if mode == "online" and not tracking.has_key():
        sys.stderr.write(f"warning: {tracking.NO_KEY}\n")
        mode = "offline"
    rows = [
        [view.name, view.moment, domain, layer, expert, share, gate]
        for view in views
        for domain, load in view.load.items()
        for layer, (shares, gates) in enumerate(
            zip(load, view.gate.get(domain, load), strict=True), 1
        )
        for expert, share, gate in zip(view.experts, shares, gates, strict=True)
    ]
    head = ["model", "moment", "domain", "layer", "expert", "share", "gate"]
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, disable_git=True)
    started = wandb.init(
        project="megatron-btx",
        job_type="routing",
        name="routing of " + ", ".join(dict.fromkeys(view.name for view in views)),
        mode="online" if mode == "online" else "offline",
        dir=str(directory),
        settings=settings,
    )
    started.log({"routing": wandb.Table(columns=head, data=rows), "page": wandb.Html(page(views))})
    started.finish()
