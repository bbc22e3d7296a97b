"""How far models that were branched from one seed have drifted apart, before they are mixed.

What is averaged well has drifted little; experts that have hardly drifted are hardly experts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_btx import svg
from megatron_btx.errors import UserErrors
from megatron_btx.files import check_directory, write_json, written
from megatron_btx.mix.compatibility import disagreements
from megatron_btx.mix.plan_of_request import open_sources
from megatron_btx.mix.request import Request
from megatron_btx.recipe.check_mix import GROUPS
from megatron_btx.weights.box import slabs, whole
from megatron_btx.weights.names import group_of
from megatron_btx.weights.plan import Checkpoint

_SLAB = 1 << 20

Grams = dict[tuple[str, int], Tensor]
"""(group, layer; -1 outside the layers) -> inner products of every two models [N, N], fp64."""


def show(request: Request, out: TextIO) -> None:
    """Print the table; write ``drift.json`` and ``drift.svg`` into ``--out`` where one is given."""
    if request.out:
        check_directory(Path(request.out))
    models = open_sources(request)
    grams = drift(models)
    labels = [model.label for model in models]
    seed = labels.index(request.seed_model) if request.seed_model in labels else None
    rows = [row for key, gram in grams.items() for row in _rows(*key, gram, labels, seed)]
    _table(rows, labels, out)
    if request.out:
        directory = Path(request.out)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "drift.json", rows)
        with written(directory / "drift.svg") as file:
            file.write(_heatmap(rows))


def drift(models: Sequence[Checkpoint]) -> Grams:
    """Inner products of the models' tensors, summed by group and layer, in one pass.

    Raises:
        UserErrors: the models are not of one shape.
    """
    errors = disagreements(models)
    if errors:
        raise UserErrors(errors)
    count = len(models)
    grams: Grams = defaultdict(lambda: torch.zeros(count, count, dtype=torch.float64))
    for name, first in models[0].tensors.items():
        gram = grams[group_of(name), _layer(name)]
        for box in slabs(whole(first.shape), _SLAB):
            values = [model.source.read(name, box).double().flatten() for model in models]
            stacked = torch.stack(values)
            gram += stacked @ stacked.T
    return dict(grams)


def _rows(
    group: str, layer: int, gram: Tensor, labels: Sequence[str], seed: int | None
) -> list[dict[str, Any]]:
    """Every pair of models: cosine, distance over the norm of the first, cosine of what each has
    learned since the seed."""
    rows = []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            distance = (gram[i, i] + gram[j, j] - 2 * gram[i, j]).clamp(min=0).sqrt()
            row = {
                "group": group,
                "layer": layer,
                "models": [labels[i], labels[j]],
                "cosine": float(gram[i, j] / (gram[i, i] * gram[j, j]).sqrt()),
                "relative_l2": float(distance / gram[i, i].sqrt()),
                "cosine_of_differences": None,
            }
            if seed is not None and seed not in (i, j):
                moved = gram - gram[[seed]] - gram[:, [seed]] + gram[seed, seed]
                lengths = (moved[i, i] * moved[j, j]).sqrt()
                row["cosine_of_differences"] = float(moved[i, j] / lengths) if lengths else None
            rows.append(row)
    return rows


def _table(rows: Sequence[dict[str, Any]], labels: Sequence[str], out: TextIO) -> None:
    """Groups against pairs, layers taken together by their mean."""
    table = Table(title="relative L2 distance (cosine; cosine of what was learned)")
    table.add_column("pair")
    groups = [group for group in GROUPS if any(row["group"] == group for row in rows)]
    for group in groups:
        table.add_column(group, justify="right")
    for pair in dict.fromkeys(tuple(row["models"]) for row in rows):
        cells = []
        for group in groups:
            own = [r for r in rows if r["group"] == group and tuple(r["models"]) == pair]
            l2, cosine = (sum(r[k] for r in own) / len(own) for k in ("relative_l2", "cosine"))
            learned = [r["cosine_of_differences"] for r in own]
            known = [value for value in learned if value is not None]
            more = f"; {sum(known) / len(known):.2f}" if known else ""
            cells.append(f"{l2:.4f} ({cosine:.4f}{more})")
        table.add_row(" - ".join(pair), *cells)
    Console(file=out, width=160).print(table)


def _heatmap(rows: Sequence[dict[str, Any]]) -> str:
    """Pairs and groups down, layers across, darker the farther apart."""
    lines = list(dict.fromkeys((tuple(row["models"]), row["group"]) for row in rows))
    layers = sorted({row["layer"] for row in rows})
    most = max((row["relative_l2"] for row in rows), default=0) or 1.0
    parts = []
    for row in rows:
        title = f"{' - '.join(row['models'])}, {row['group']}, layer {row['layer']}"
        parts.append(
            svg.element(
                "rect",
                svg.element("title", f"{title}: {row['relative_l2']:.5f}"),
                x=240 + 18 * layers.index(row["layer"]),
                y=20 + 18 * lines.index((tuple(row["models"]), row["group"])),
                width=17,
                height=17,
                fill="#1f4e79",
                fill_opacity=f"{row['relative_l2'] / most:.3f}",
            )
        )
    for at, (pair, group) in enumerate(lines):
        label = f"{' - '.join(pair)}: {group}"
        parts.append(svg.element("text", label, x=234, y=33 + 18 * at, text_anchor="end"))
    return svg.document(260 + 18 * len(layers), 30 + 18 * len(lines), *parts) + "\n"


def _layer(name: str) -> int:
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
