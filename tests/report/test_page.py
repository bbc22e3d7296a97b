"""The page of a made-up run: whole, self-contained, true to its numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_btx.cli.main import main
from megatron_btx.evaluate.results import SystemResult
from megatron_btx.pipeline.local.run_recipe import _kept_current
from megatron_btx.recipe.load import dump_kept
from megatron_btx.recipe.schema import Recipe
from megatron_btx.report import comparison_page, page, routing, run_figures
from megatron_btx.report.comparison import Comparison, System
from megatron_btx.report.routing import RoutingView
from megatron_btx.report.run_data import gather
from tests.report.made import FINAL, make_run
from tests.small import tree_hash


class _Reader(HTMLParser):
    """Checks that what is opened is closed, and collects text and tags."""

    VOID = frozenset({"meta", "circle", "line", "rect", "polyline", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def _read(text: str) -> _Reader:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    return make_run(tmp_path_factory.mktemp("made"))


def test_the_page_needs_nothing_from_outside(made: tuple[Recipe, Path]) -> None:
    text = page.write(*made).read_text(encoding="utf-8")
    reader = _read(text)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in reader.tags if {"src", "href"} & set(attrs)]
    assert "url(" not in text
    assert "@import" not in text
    assert len(text) < 400_000


def test_every_picture_is_well_formed_and_has_a_name(made: tuple[Recipe, Path]) -> None:
    text = page.render(gather(*made))
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(pictures) >= 1 + 6 + 2 * 4  # compute, six stages, load and gate per domain
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("aria-label") or root.get("aria-hidden")
    assert len(re.findall(r"tokens \((?:millions|thousands)\)", text)) == 6
    assert len(re.findall("loss \\(nats/token\\)", text)) >= 6


def test_the_table_shows_every_loss(made: tuple[Recipe, Path]) -> None:
    words = _read(page.render(gather(*made))).words
    for losses in FINAL.values():
        for loss in losses.values():
            assert f"{loss:.3f}" in words


def test_dots_lie_where_their_numbers_are(made: tuple[Recipe, Path]) -> None:
    """Pixels back into numbers, through the ticks of the picture itself."""
    picture = run_figures.compute(gather(*made))
    assert picture is not None
    root = ElementTree.fromstring(picture)
    ticks = [t for t in root.iter("text") if t.get("class") == "tick"]
    y_ticks = [t for t in ticks if t.get("text-anchor") == "end"]
    pairs = [(float(t.get("y") or 0) - 4, float(t.text or 0)) for t in y_ticks]
    (y1, v1), (y2, v2) = pairs[0], pairs[-1]
    large = [c for c in root.iter("circle") if c.get("r") == "5"]
    assert len(large) == len(FINAL)
    for dot in large:
        told = float(re.findall(r"[\d.]+$", dot[0].text or "")[0])
        seen = v1 + (float(dot.get("cy") or 0) - y1) * (v2 - v1) / (y2 - y1)
        assert seen == pytest.approx(told, abs=0.002)


def test_what_is_not_known_is_said_and_not_drawn(tmp_path: Path) -> None:
    recipe, run_dir = make_run(tmp_path)
    results = json.loads((run_dir / "results.json").read_text())
    unknown = {"train_tokens": None, "train_flops": None}
    results["systems"]["expert:math"] |= unknown
    results["systems"]["btx"] |= unknown | {"stages": {"expert:math": {"tokens": None}}}
    (run_dir / "results.json").write_text(json.dumps(results))
    facts = gather(recipe, run_dir)
    assert "taken as math expert does not say" in page.render(facts)
    picture = run_figures.compute(facts)
    assert picture is not None
    assert "Branch-Train-MiX" not in picture
    assert picture.count('r="5"') == len(FINAL) - 2


def test_routing_in_words(made: tuple[Recipe, Path]) -> None:
    facts = gather(*made)
    assert facts.routing is not None
    said = " ".join(run_figures.routing_words(facts.routing))
    assert "on math to math" in said
    assert "No expert is dead" in said
    for matrix in facts.routing.load.values():
        for row in matrix:
            row[1], row[0] = 0.0, row[0] + row[1]
    assert "Dead (below 1% of all choices): math." in " ".join(
        run_figures.routing_words(facts.routing)
    )


@pytest.mark.parametrize("upto", [0, 1, 2, 4, 6, 7, 8])
def test_a_run_on_its_way_has_a_page(tmp_path: Path, upto: int) -> None:
    text = page.write(*make_run(tmp_path, upto)).read_text(encoding="utf-8")
    _read(text)
    assert "Not finished yet:" in text


def test_what_a_run_says_is_escaped(tmp_path: Path) -> None:
    recipe, run_dir = make_run(tmp_path)
    results = json.loads((run_dir / "results.json").read_text())
    results["systems"]["<script>alert(1)</script>"] = results["systems"].pop("dense")
    (run_dir / "results.json").write_text(json.dumps(results))
    assert "<script" not in page.render(gather(recipe, run_dir))


BAD = "<script>alert(1)</script>"


def test_no_page_takes_markup_from_a_file(tmp_path: Path) -> None:
    """Names of systems, domains and experts, in text, titles and attributes."""
    view = RoutingView(
        name=BAD, moment=f'"{BAD}', balance_loss_coeff=None, experts=[BAD, "b"],
        load={BAD: [[0.5, 0.5]]}, gate={BAD: [[0.5, 0.5]]},
    )  # fmt: skip
    losses = SystemResult(name=BAD, loss={BAD: 1.0, "mean": 1.0}, train_flops=1)
    row = System(name=BAD, system="btx", result=losses, losses={1: losses.loss})
    made = Comparison(columns=(BAD, "mean"), systems=(row,), best={})
    made = dataclasses.replace(made, best={BAD: BAD, "mean": BAD})
    for text in (routing.page([view]), comparison_page.render(made, BAD, [BAD], BAD)):
        reader = _read(text)
        assert "script" not in {tag for tag, _ in reader.tags}
        assert BAD in reader.words


def test_a_run_on_its_way_loads_itself_again(tmp_path: Path) -> None:
    """And says so; a finished one does not."""
    (tmp_path / "half").mkdir()
    text = page.write(*make_run(tmp_path / "half", 4)).read_text(encoding="utf-8")
    assert f'<meta http-equiv="refresh" content="{page.REFRESH}">' in text
    assert f"loads itself again every {page.REFRESH} seconds" in text
    text = page.write(*make_run(tmp_path)).read_text(encoding="utf-8")
    assert "http-equiv" not in text
    assert "loads itself again" not in text


def test_btx_run_writes_it_anew(tmp_path: Path) -> None:
    """While stages are at work, again and again; a damaged record does not end the run."""
    recipe, run_dir = make_run(tmp_path, 4)
    path = run_dir / "report.html"
    with _kept_current(lambda: page.write(recipe, run_dir), run_dir, 0.01):
        for _ in range(2):
            path.unlink(missing_ok=True)
            deadline = time.monotonic() + 600
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        (run_dir / "seed" / "metrics.jsonl").write_text('{"kind": "train", "step": "x"}\n')
        time.sleep(0.05)
    assert "Not finished yet" in path.read_text(encoding="utf-8")
    path.unlink()
    time.sleep(0.05)
    assert not path.exists(), "it ends with the run"


def test_a_run_that_was_copied_is_the_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of its directory reads and writes there, and nothing in the one it came from."""
    recipe, run_dir = make_run(tmp_path)
    (run_dir / "recipe.yaml").write_text(dump_kept(recipe, run_dir))
    (run_dir / "lock").touch()
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    before = tree_hash(run_dir)
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").exists()
    capsys.readouterr()
    assert main(["run", str(copy), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["run_dir"], {one["state"] for one in told["stages"]}) == (str(copy), {"done"})
    assert tree_hash(run_dir) == before
    shutil.rmtree(run_dir)
    assert main(["status", str(copy), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in rows} == {"done"}
