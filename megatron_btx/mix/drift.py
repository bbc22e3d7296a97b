"""How far models that were branched from one seed have drifted apart, before they are mixed.

Weights that drifted little average well; experts that drifted little have learned little. The
time is that of one reading of every model; of the pairs of N models only N x N numbers are kept.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TextIO

import rich.markup
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_btx import svg
from megatron_btx.errors import UserError, UserErrors, shown
from megatron_btx.files import check_directory, check_file, read_bytes, written
from megatron_btx.mix.anchored import own_expert
from megatron_btx.mix.compatibility import disagreements
from megatron_btx.mix.plans import open_sources
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe.check_mix import GROUPS
from megatron_btx.recipe.names import canonical_tensors, group_of
from megatron_btx.weights.box import slabs, whole
from megatron_btx.weights.plan import Checkpoint

_ELEMENTS = 1 << 22
"""Of all models together that are held at a time."""
_ALL_PAIRS = 9
"""Models of which every pair is shown."""
_MARKS = {".json": '"cosine_of_differences"', ".svg": ": ffn</text>", ".csv": "relative_l2"}
"""By suffix what is in every file that we write."""

Grams = dict[tuple[str, int], Tensor]
"""(group, layer; -1 outside the layers) -> inner products of every two models [N, N], fp64."""


def show(request: MixRequest, out: TextIO) -> None:
    """Print the table; write ``drift.json`` and ``drift.svg`` into ``--out`` where one is given, or
    the one file that its name says: ``.json``, ``.svg`` or ``.csv``.

    Raises:
        UserError: ``--out`` cannot be written, or what is there was not written by ``btx drift``.
    """
    if len(request.sources) < 2:
        raise UserError(
            "--sources", "is one model: there is nothing to compare", "give two or more"
        )
    files = _files(Path(request.out)) if request.out else {}
    if request.align_vocab:
        raise UserError("--align-vocab", "has no meaning for btx drift", "leave it out")
    _, models = open_sources(request)
    grams = drift(models)
    labels = [model.label for model in models]
    seed = labels.index(request.seed_model) if request.seed_model in labels else None
    rows = [row for key, gram in grams.items() for row in _rows(*key, gram, labels, seed)]
    told = _told(rows, labels, seed)
    _table(told, out)
    for kind, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written(path) as file:
            if kind == ".json":
                file.write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            elif kind == ".svg":
                file.write(_heatmap(told))
            else:
                _write_csv(rows, file)


def _files(out: Path) -> dict[str, Path]:
    """What is written where, by suffix."""
    if out.suffix in _MARKS:
        check_file(out)
        files = {out.suffix: out}
    else:
        check_directory(out)
        files = {kind: out / f"drift{kind}" for kind in (".json", ".svg")}
    for kind, path in files.items():
        if os.path.lexists(path) and _MARKS[kind].encode() not in read_bytes(path, 1 << 30):
            raise UserError(
                str(path), "exists and was not written by btx drift", "choose another --out"
            )
    return files


def _write_csv(rows: Sequence[dict[str, Any]], file: IO[Any]) -> None:
    head = ["model", "other", *(key for key in rows[0] if key != "models")] if rows else []
    table = csv.writer(file, lineterminator="\n")
    table.writerow(head)
    for row in rows:
        table.writerow([*row["models"], *(row[key] for key in head[2:])])


def drift(models: Sequence[Checkpoint]) -> Grams:
    """Inner products of the models' tensors, summed by group and layer, in one pass; of an anchored
    branch its own expert's.

    Raises:
        UserErrors: the models are not of one shape.
    """
    models = [own_expert(model) for model in models]
    errors = disagreements(models, alignable=False)
    if errors:
        raise UserErrors(errors)
    count = len(models)
    grams: Grams = defaultdict(lambda: torch.zeros(count, count, dtype=torch.float64))
    known = canonical_tensors(models[0].architecture)
    for name, first in models[0].tensors.items():
        if name not in known:  # a branch's router
            continue
        gram = grams[group_of(name), _layer(name)]
        for box in slabs(whole(first.shape), max(1, _ELEMENTS // count)):
            values = [model.source.read(name, box).double().flatten() for model in models]
            stacked = torch.stack(values)
            gram += stacked @ stacked.T
    return dict(grams)


def _rows(
    group: str, layer: int, gram: Tensor, labels: Sequence[str], seed: int | None
) -> list[dict[str, Any]]:
    """Every pair of models: cosine, distance over the norm of the first, cosine of what each has
    learned since the seed."""
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    squares = gram.diagonal()
    distance = (squares[first] + squares[second] - 2 * gram[first, second]).clamp(min=0).sqrt()
    learned = [None] * len(first) if seed is None else _learned(gram, seed, first, second)
    relative = distance / squares[first].sqrt()
    columns = (
        first.tolist(),
        second.tolist(),
        _defined(_cosine(gram)[first, second]),
        _defined(relative.where(distance > 0, 0.0)),
        learned,
    )
    return [
        {
            "group": group,
            "layer": layer,
            "models": [labels[i], labels[j]],
            "cosine": cosine,
            "relative_l2": relative,
            "cosine_of_differences": learned,
        }
        for i, j, cosine, relative, learned in zip(*columns, strict=True)
    ]


def _cosine(gram: Tensor) -> Tensor:
    return gram / (gram.diagonal()[:, None] * gram.diagonal()[None]).sqrt()


def _learned(gram: Tensor, seed: int, first: Tensor, second: Tensor) -> list[float | None]:
    """Cosine of the differences from the seed; ``None`` with the seed itself, and where a model has
    not moved."""
    moved = gram - gram[[seed]] - gram[:, [seed]] + gram[seed, seed]
    with_seed = (first == seed) | (second == seed)
    return _defined(_cosine(moved)[first, second].where(~with_seed, math.nan))


def _defined(values: Tensor) -> list[float | None]:
    """``None`` for what tensors of zeros have not: a direction, a length to compare with."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _told(
    rows: Sequence[dict[str, Any]], labels: Sequence[str], seed: int | None
) -> list[dict[str, Any]]:
    """What table and picture show: every pair of a few models, of many each with the seed (or the
    first). ``drift.json`` has all."""
    if len(labels) <= _ALL_PAIRS:
        return list(rows)
    against = labels[seed or 0]
    return [row for row in rows if against in row["models"]]


def _table(rows: Sequence[dict[str, Any]], out: TextIO) -> None:
    """Groups against pairs, layers taken together by their mean."""
    table = Table(title="relative L2 distance (cosine; cosine of what was learned)")
    table.add_column("pair")
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        cells.setdefault(tuple(row["models"]), defaultdict(list))[row["group"]].append(row)
    groups = [group for group in GROUPS if any(group in own for own in cells.values())]
    for group in groups:
        table.add_column(group, justify="right")
    for pair, by_group in cells.items():
        name = rich.markup.escape(" - ".join(map(shown, pair)))
        table.add_row(name, *(_cell(by_group[group]) for group in groups))
    Console(file=out, width=160).print(table)


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    l2, cosine, learned = (
        _mean([row[key] for row in rows])
        for key in ("relative_l2", "cosine", "cosine_of_differences")
    )
    more = "" if learned is None else f"; {learned:.2f}"
    return f"{_shown(l2)} ({_shown(cosine)}{more})"


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are defined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _heatmap(rows: Sequence[dict[str, Any]]) -> str:
    """Pairs and groups down, layers across, darker the farther apart."""
    keys = dict.fromkeys((tuple(row["models"]), row["group"]) for row in rows)
    lines = {key: at for at, key in enumerate(keys)}
    names = {pair: " - ".join(map(shown, pair)) for pair, _ in lines}
    columns = {layer: at for at, layer in enumerate(sorted({row["layer"] for row in rows}))}
    most = max((row["relative_l2"] or 0 for row in rows), default=0) or 1.0
    parts = []
    for row in rows:
        if row["relative_l2"] is None:
            continue
        pair = tuple(row["models"])
        title = f"{names[pair]}, {row['group']}, layer {row['layer']}"
        parts.append(
            svg.element(
                "rect",
                svg.element("title", f"{title}: {row['relative_l2']:.5f}"),
                x=240 + 18 * columns[row["layer"]],
                y=20 + 18 * lines[pair, row["group"]],
                width=17,
                height=17,
                fill="#1f4e79",
                fill_opacity=f"{row['relative_l2'] / most:.3f}",
            )
        )
    for (pair, group), at in lines.items():
        label = f"{names[pair]}: {group}"
        parts.append(svg.element("text", label, x=234, y=33 + 18 * at, text_anchor="end"))
    return svg.document(260 + 18 * len(columns), 30 + 18 * len(lines), *parts) + "\n"


def _layer(name: str) -> int:
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else -1
