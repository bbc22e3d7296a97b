"""Records of a run that were changed from outside: one clear error each, or what there is."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.cli import compare
from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import Results
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report import comparison, figure_files, page, run_data, run_figures, table
from megatron_btx.report.comparison import FinishedRun
from megatron_btx.train import metrics
from tests.report.made import make_run

VALUES = [None, True, -1, 0, "x", [], {}, [[1]], [[0.5, 0.5]], {"a": {}}, {"tokens": 1}, "\x1b[31m"]
NUMBERS = [1e400, -1e400, math.nan, 1e308, 10**308, 3e38]
RESULTS = "results.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    return make_run(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def content(made: tuple[Recipe, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made[1] / RESULTS).read_text())
    routed = {"load": {"code": [[0.5, 0.5]]}, "gate": {"code": [[0.5, 0.5]]}, "experts": ["a", "b"]}
    found["systems"]["btx"] |= {**routed, "expert_choice": "drawn", "checkpoint": ["a", "b"]}
    return found


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value[:1]))
    return [path, *(place for key, part in items for place in _places(part, (*path, key)))]


def test_results_with_any_value_in_any_place(
    made: tuple[Recipe, Path], content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as a value of the right kind, or refused by name; never another exception. What is read
    is shown: as table, page, figures and comparison, and in strict JSON."""
    recipe, run_dir = made
    facts, finished = run_data.gather(recipe, run_dir), FinishedRun(recipe=recipe, run_dir=run_dir)
    monkeypatch.setattr(comparison, "_seconds_of_log", lambda log: 1.0)
    read = Results.from_json(content, "results.json")
    assert Results.from_json(read.to_json(), "again") == read
    assert read.systems["btx"].loss == content["systems"]["btx"]["loss"]
    assert read.systems["btx"].load["code"] == [[0.5, 0.5]]
    said: list[UserError] = []
    looked_at = {"code", "btx", "expert:code"}  # of what is of one kind, a part
    alike = {*content["text"], *content["systems"]} - looked_at
    places = [place for place in _places(content) if place and not alike & set(place)]
    places = [place for place in places if "expert:code" not in place or "loss" in place]
    for place in places:
        at = content
        for key in place:
            at = at[key]
        number = isinstance(at, int | float)
        for value in (*VALUES, *(NUMBERS if number else ())):
            changed = copy.deepcopy(content)
            at = changed
            for key in place[:-1]:
                at = at[key]
            if value == at[place[-1]]:
                continue
            at[place[-1]] = value
            try:
                read = Results.from_json(changed, RESULTS)
            except UserError as error:
                said.append(error)
                continue
            _show(replace(facts, results=read))
            monkeypatch.setattr(Results, "read", lambda _, read=read: read)
            with contextlib.suppress(UserError):  # a column without its losses
                one = compare._one(comparison.compare([finished]), [], "all", {})
                json.loads(one.files["json"], parse_constant=pytest.fail)
    assert all(one.where.startswith(RESULTS) and "btx run" in one.fix for one in said)
    assert len(said) > 3 * len(places)


def _show(facts: run_data.RunData) -> None:
    assert facts.results is not None
    page._results(facts, facts.results)
    page._routing(facts)
    table.show(facts.results, io.StringIO())
    table._rich(facts.results, io.StringIO())
    run_figures.compute(facts)
    figure_files._system_rows(facts.results)
    json.dumps(facts.results.to_json(), allow_nan=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"systems": []}', "[" * 100_000, "{}"])
def test_a_damaged_results_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        Results.read(tmp_path)


def test_an_old_results_file_is_read() -> None:
    """As the first version wrote it: neither domains nor text, numbers as floats."""
    old = {"systems": {"seed": {"loss": {"a": 1, "mean": 1.0}, "train_tokens": 12e6}}}
    found = Results.from_json(old, "results.json")
    assert found.columns == ("a", "mean")
    assert found.systems["seed"].train_tokens == 12_000_000
    assert found.systems["seed"].params_total is None
    assert not found.text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"kind": "train", "step": "5"}', "step is '5'"),
        ('{"kind": "train", "step": 5, "loss": []}', "loss is \\[\\], no number"),
        ('{"kind": "eval", "step": 5}', "loss is None"),
        ('{"kind": "eval", "step": 5, "loss": {"a": "b"}}', "loss is 'b', no number"),
        ('{"kind": "eval", "step": 5, "loss": {"a": 1}, "load": {"a": [1]}}', "load is 1"),
        ('{"kind": "start", "step": 0, "total_steps": "many"}', "total_steps is 'many'"),
        ('{"step": 5}', "kind is None"),
    ],
)
def test_damaged_metrics(tmp_path: Path, line: str, words: str) -> None:
    """Refused by line where they are shown; a run that goes on leaves the record out."""
    recipe, run_dir = make_run(tmp_path)
    path = run_dir / "seed" / "metrics.jsonl"
    before = path.read_text()
    path.write_text(f"{before}{line}\n")
    lines = before.count("\n")
    with pytest.raises(UserError, match=f"metrics.jsonl:{lines + 1}: is damaged: {words}"):
        page.write(recipe, run_dir)
    assert len(metrics.read(path, strict=False)) == lines
