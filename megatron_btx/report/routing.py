"""Where the router of runs and checkpoints sends which text, as in the paper's figures 3 to 6
(arXiv 2403.07816): table, page and W&B. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Matrix, Results
from megatron_btx.evaluate.routing_stats import DEAD, choice_in_words, expert_choice
from megatron_btx.pipeline.stage_tables import columns
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Recipe, WandB
from megatron_btx.report import html
from megatron_btx.report.figure_svg import heatmap
from megatron_btx.train import metrics


@dataclass(frozen=True, kw_only=True)
class RoutingView:
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
    """Of Sample Top-1 (evaluate/routing_stats.py)."""

    @property
    def title(self) -> str:
        """For people."""
        alpha, said = self.balance_loss_coeff, [self.name, self.moment]
        if alpha is not None:
            said.append(f"balance loss {alpha:g}" if alpha else "no balance loss")
        if self.expert_choice is not None:
            said.append(choice_in_words(self.expert_choice))
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
        """Every line, with the dead experts by name."""
        return {**asdict(self), "dead": self.dead(), "layers": len(over_domains(self.load))}


def of_run(run_dir: Path) -> list[RoutingView]:
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
    results = Results.read(run_dir)
    systems = results.systems.values() if results is not None else ()
    return next((system.to_json() for system in systems if system.load), record)


def _view(recipe: Recipe, moment: str, record: Mapping[str, Any]) -> RoutingView:
    return RoutingView(
        name=recipe.name,
        moment=moment,
        balance_loss_coeff=recipe.routing.balance_loss_coeff,
        experts=list(record.get("experts") or recipe.expert_names),
        load=dict(record["load"]),
        gate=dict(record.get("gate") or {}),
        expert_choice=expert_choice(recipe.routing),
    )


def over_domains(measured: Mapping[str, Matrix]) -> Matrix:
    """Mean over the domains, each counting the same."""
    matrices = list(measured.values())
    return [
        [sum(cell) / len(cell) for cell in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def table(view: RoutingView) -> str:
    """Share of the choices and mean gate, in percent, for each domain, layer and expert."""
    head = ["domain", "layer", *view.experts, *(f"gate {name}" for name in view.experts)]
    rows = []
    for domain, load in view.load.items():
        gate = view.gate.get(domain, load)
        for layer, (shares, gates) in enumerate(zip(load, gate, strict=True), 1):
            cells = [f"{100 * value:.1f}" for value in (*shares, *gates)]
            rows.append([domain, str(layer), *cells])
    return f"{view.title} (%)\n{columns(head, rows)}{words(view)}\n"


def words(view: RoutingView) -> str:
    """Each domain's most used expert, and dead experts."""
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


def page(views: Sequence[RoutingView]) -> str:
    """Heatmaps of every view, one scale for all shares and one for all gates; needs no network."""
    groups = [
        (
            label,
            [
                (view.title, words(view) if key == "load" else "", pictures)
                for view, pictures in zip(views, heatmaps(views, key), strict=True)
            ],
        )
        for key, label in MEASURES.items()
    ]
    return html.render("routing.html", groups=groups)


MEASURES = {"load": "Share of the choices", "gate": "Mean gate"}


def heatmaps(views: Sequence[RoutingView], key: str) -> list[list[tuple[str, Markup]]]:
    """``(domain, picture)`` of every view of one of ``MEASURES``, all on one scale."""
    matrices = [matrix for view in views for matrix in getattr(view, key).values()]
    top = max((value for matrix in matrices for row in matrix for value in row), default=0.0)
    return [
        [
            (
                domain,
                heatmap(
                    matrix,
                    rows=[str(layer + 1) for layer in range(len(matrix))],
                    columns=view.experts,
                    top=top,
                    name=f"{MEASURES[key]} on {domain}: {view.title}",
                    row_label="layer",
                ),
            )
            for domain, matrix in getattr(view, key).items()
        ]
        for view in views
    ]


def log(views: Sequence[RoutingView], mode: str, directory: Path, block: WandB) -> None:
    """One W&B run with every number and the page.

    Args:
        views: what it shows.
        mode: ``offline`` or ``online``.
        directory: for offline files.
        block: project and entity.

    Raises:
        UserError: W&B fails.
    """
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
    try:
        started = wandb.init(
            project=block.project,
            entity=block.entity,
            job_type="routing",
            name="routing of " + ", ".join(dict.fromkeys(view.name for view in views)),
            mode="online" if mode == "online" else "offline",
            dir=str(directory),
            settings=settings,
        )
        logged = {"routing": wandb.Table(columns=head, data=rows), "page": wandb.Html(page(views))}
        started.log(logged)
        started.finish()
    except (wandb.errors.Error, ValueError) as error:
        what = f"W&B has failed: {error}"
        raise UserError(f"--wandb {mode}", what, "use --wandb offline, or --out alone") from None
