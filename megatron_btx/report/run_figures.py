"""The figures of a run: loss curves, loss against compute, routing heatmaps. Data in, SVG out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from megatron_btx.evaluate.results import MEAN, Matrix
from megatron_btx.report import table
from megatron_btx.report.figure_svg import Axes, Dot, Line, heatmap, power_of_ten, thin
from megatron_btx.report.html import series
from megatron_btx.report.run_data import RoutingData, RunData, StageData


def losses(facts: RunData) -> list[tuple[str, Markup]]:
    """``(stage, picture)`` for every stage that trains: the training loss and the held-out loss of
    each domain against the stage's tokens. All but the seed share one scale."""
    trained = [stage for stage in facts.stages if stage.train]
    later = [stage for stage in trained if stage.stage.kind != "seed"]
    common = _range(value for stage in later for value in _values(stage))
    pictures = []
    for stage in trained:
        limits = common if stage in later else _range(_values(stage))
        pictures.append((stage.stage.name, _loss(facts, stage, limits)))
    return pictures


def loss_legend(facts: RunData) -> list[tuple[str, str]]:
    """What the lines of ``losses`` are: label and style."""
    domains = [(f"held-out {name}", style) for name, style in _domain_styles(facts).items()]
    return [("training loss", "train"), *domains]


def _domain_styles(facts: RunData) -> dict[str, str]:
    return {name: series(index) for index, name in enumerate(facts.recipe.domains)}


def _loss(facts: RunData, stage: StageData, limits: tuple[float, float]) -> Markup:
    total = max(stage.tokens, stage.tokens_at(stage.total_steps))
    scale, unit = _tokens_unit(total)
    axes = Axes(
        x_range=(0, total / scale),
        y_range=limits,
        x_label=f"tokens{unit}",
        y_label="loss (nats/token)",
        name=f"{stage.stage.name}: training loss and held-out losses against tokens",
    )
    record = [(r["tokens"] / scale, r["loss"]) for r in stage.train if "tokens" in r]
    axes.line(Line(label="training loss", points=thin(record), style="train"))
    for name, style in _domain_styles(facts).items():
        points = [
            (stage.tokens_at(record["step"]) / scale, record["loss"][name])
            for record in stage.evals
            if name in record["loss"]
        ]
        axes.line(Line(label=f"held-out {name}", points=points, style=style, dots=True))
    return axes.render()


def _values(stage: StageData) -> list[float]:
    """What the y range must hold: all held-out losses, the training loss after its steep start."""
    found = [loss for record in stage.evals for loss in record["loss"].values()]
    later = stage.train[len(stage.train) // 20 :]
    return found + [loss for _, loss in thin([(r["step"], r["loss"]) for r in later], 100)]


def _range(values: Iterable[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low or 1.0)
    return low - margin, high + margin


def compute(facts: RunData) -> Markup | None:
    """Mean held-out loss against the training compute after the seed.

    A system's dot is its final evaluation; its line are the evaluations during training, on less
    text. All lines begin at the seed but BTX's, which begins where its experts' compute ends.
    """
    if facts.results is None:
        return None
    systems = {row.name: row for row in table.rows(facts.results) if MEAN in row.loss}
    spent = {
        name: 0.0 if name == "seed" else float(row.train_flops or 0.0)
        for name, row in systems.items()
        if name == "seed" or row.train_flops
    }
    if len(spent) < 2:
        return None
    exponent = math.floor(math.log10(max(spent.values()) or 1))
    scale = 10.0**exponent
    dots = [
        Dot(
            label=table.title(name),
            x=spent[name] / scale,
            y=row.loss["mean"],
            style=_style(facts, name),
        )
        for name, row in systems.items()
        if name in spent
    ]
    lines = []
    for name, stage, start in _courses(facts, spent):
        points = _course(stage, start / scale, spent[name] / scale) if name in spent else []
        if points:  # none of a model that was taken
            if name != "btx" and "seed" in spent:
                points = [(0.0, systems["seed"].loss["mean"]), *points]
            label = f"{table.title(name)}, during training"
            lines.append(Line(label=label, points=points, style=_style(facts, name), dots=True))
    seen = [dot.y for dot in dots] + [y for line in lines for _, y in line.points]
    axes = Axes(
        x_range=(0, max(dot.x for dot in dots)),
        y_range=_range(seen),
        x_label=f"training compute after the seed ({power_of_ten(exponent)} FLOPs)",
        y_label="mean held-out loss (nats/token)",
        name="Mean held-out loss of every system against its training compute",
        width=560,
        height=340,
        left=60,
        right=150,
    )
    for line in lines:
        axes.line(line)
    axes.dots(dots)
    return axes.render()


def _style(facts: RunData, name: str) -> str:
    if name.startswith("expert:"):
        return _domain_styles(facts).get(name.removeprefix("expert:"), "train")
    return {"btx": "btx-line", "dense": "dense-line", "seed": "seed-line"}.get(name, "train")


def _courses(facts: RunData, spent: Mapping[str, float]) -> list[tuple[str, StageData, float]]:
    """``(system, its last stage, FLOPs after the seed that were spent before that stage)``."""
    stages = facts.by_name
    experts = [stage for name, stage in stages.items() if name.startswith("expert:")]
    found = [(stage.stage.name, stage, 0.0) for stage in experts]
    if "dense" in stages:
        found.append(("dense", stages["dense"], 0.0))
    if "finetune" in stages:
        found.append(
            ("btx", stages["finetune"], sum(spent.get(e.stage.name, 0.0) for e in experts))
        )
    return found


def _course(stage: StageData, start: float, end: float) -> list[tuple[float, float]]:
    total = stage.total_steps or stage.steps
    return [
        (start + (end - start) * record["step"] / total, record["loss"]["mean"])
        for record in stage.evals
        if "mean" in record["loss"] and total
    ]


def routing(facts: RunData, routing: RoutingData) -> list[tuple[str, list[tuple[str, Markup]]]]:
    """``(measure, [(domain, heatmap)])``: share of tokens, and mean gate weight."""
    groups = []
    for label, measured in (("Share of tokens", routing.load), ("Mean gate weight", routing.gate)):
        top = max((v for matrix in measured.values() for row in matrix for v in row), default=0.0)
        pictures = [
            (domain, _heat(matrix, routing.experts, top, f"{label} on {domain}"))
            for domain, matrix in _ordered(facts, measured)
        ]
        if pictures:
            groups.append((label, pictures))
    return groups


def _ordered(facts: RunData, measured: Mapping[str, Matrix]) -> list[tuple[str, Matrix]]:
    """By domain, in the recipe's order."""
    domains = list(facts.recipe.domains)
    return sorted(measured.items(), key=lambda item: (domains + [item[0]]).index(item[0]))


def _heat(matrix: Matrix, experts: Sequence[str], top: float, name: str) -> Markup:
    return heatmap(
        matrix,
        rows=[str(layer + 1) for layer in range(len(matrix))],
        columns=list(experts),
        top=top,
        name=name,
        row_label="layer",
    )


def routing_words(routing: RoutingData) -> list[str]:
    """What the heatmaps say, in sentences: preferred experts, dead ones."""
    said = []
    use = {domain: _over_layers(matrix) for domain, matrix in routing.load.items()}
    preferred = []
    for domain, shares in use.items():
        index = max(range(len(shares)), key=shares.__getitem__)
        preferred.append(f"{domain} to {routing.experts[index]} ({shares[index]:.0%})")
    if preferred:
        said.append("Over all layers, most choices go on " + ", on ".join(preferred) + ".")
    overall = _over_layers(list(use.values()))
    dead = [routing.experts[i] for i, share in enumerate(overall) if share < 0.01]
    if dead:
        said.append(f"Dead (below 1% of all choices): {', '.join(dead)}.")
    elif overall:
        least = min(range(len(overall)), key=overall.__getitem__)
        said.append(
            f"No expert is dead: the least used, {routing.experts[least]}, gets "
            f"{overall[least]:.0%} of all choices; an even share is {1 / len(overall):.0%}."
        )
    return said


def _over_layers(matrix: Sequence[Sequence[float]]) -> list[float]:
    """Means of the columns."""
    return [sum(column) / len(column) for column in zip(*matrix, strict=True)]


def _tokens_unit(total: float) -> tuple[float, str]:
    for scale, unit in ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)")):
        if total >= scale:
            return scale, unit
    return 1.0, ""
