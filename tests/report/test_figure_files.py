"""Figures as files: whole in themselves, true to their numbers."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.report import figure_files
from megatron_btx.report.run_data import RunData, gather
from tests.report.made import DOMAINS, FINAL, make_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return gather(*make_run(tmp_path_factory.mktemp("made")))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_svg_is_whole_in_itself(run: RunData, tmp_path: Path) -> None:
    """Size, namespace and every style are in it; nothing in it is a variable or comes from
    outside."""
    made = {one.name: one for one in figure_files.of_run(run)}
    assert list(made) == ["losses", "compute", "routing"]
    for one in made.values():
        one.save(tmp_path / f"{one.name}.svg")
        text = (tmp_path / f"{one.name}.svg").read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert float(root.get("width") or 0) > 100
        style = root.findtext(f"{SVG}style") or ""
        assert "var(" not in text
        assert "url(" not in text
        assert "--" not in style
        for used in root.iter():
            for name in (used.get("class") or "").split():
                assert f".{name}" in style or name in ("weak", "train"), name
    words = "".join(ElementTree.fromstring(made["losses"].svg).itertext())
    assert all(f"held-out {name}" in words for name in DOMAINS)
    assert "finetune" in words


def test_pictures_do_not_overlap(run: RunData) -> None:
    (_, _, routing) = figure_files.of_run(run)
    root = ElementTree.fromstring(routing.svg)
    boxes = [
        tuple(float(one.get(key) or 0) for key in ("x", "y", "width", "height"))
        for one in root.findall(f"{SVG}svg")
    ]
    assert len(boxes) == 2 * len(DOMAINS)
    for place, (x, y, wide, tall) in enumerate(boxes):
        assert x + wide <= float(root.get("width") or 0)
        assert y + tall <= float(root.get("height") or 0)
        for a, b, c, d in boxes[:place]:
            assert x >= a + c or a >= x + wide or y >= b + d or b >= y + tall


def test_the_numbers_behind_them(run: RunData, tmp_path: Path) -> None:
    for one in figure_files.of_run(run):
        one.save(tmp_path / f"{one.name}.csv")
    table = {row["system"]: row for row in rows(tmp_path / "compute.csv")}
    assert set(table) == set(FINAL)
    for name, loss in FINAL.items():
        row = {column: float(value) for column, value in table[name].items() if column != "system"}
        assert row["loss_mean"] == pytest.approx(sum(loss.values()) / 4)
        assert {domain: row[f"loss_{domain}"] for domain in DOMAINS} == loss
        assert row["flops_after_seed"] == (0 if name == "seed" else row["train_flops"])
    shares = rows(tmp_path / "routing.csv")
    assert run.routing is not None
    one = shares[5]
    place = run.routing.experts.index(one["expert"])
    assert float(one["share"]) == run.routing.load[one["domain"]][int(one["layer"]) - 1][place]
    layers = len(next(iter(run.routing.load.values())))
    assert len(shares) == len(DOMAINS) * layers * len(run.routing.experts)
    losses = rows(tmp_path / "losses.csv")
    assert {row["curve"] for row in losses} == {"training", *DOMAINS, "mean"}
    assert sum(row["curve"] == "training" for row in losses) == sum(
        len(s.train) for s in run.stages
    )


def test_a_png_shows_the_same(run: RunData, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py", reason="resvg-py is not installed")
    figure_files.check_png()
    one = figure_files.of_run(run)[0]
    one.save(tmp_path / "losses.png")
    content = (tmp_path / "losses.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width = int.from_bytes(content[16:20], "big")
    wanted = ElementTree.fromstring(one.svg).get("width")
    assert width == round(float(wanted or 0) * figure_files.ZOOM)
    unlabelled = re.sub("<text.*?</text>", "", one.svg)
    dataclasses.replace(one, svg=unlabelled).save(tmp_path / "bare.png")
    assert (tmp_path / "bare.png").read_bytes() != content, "its labels are drawn"


def _routing_run(tmp_path: Path) -> Path:
    recipe, run_dir = make_run(tmp_path)
    (run_dir / "recipe.yaml").write_bytes((tmp_path / "recipe.yaml").read_bytes())
    return run_dir


def test_out_means_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``--out routing.svg`` is a file of that name; a directory gets all."""
    run_dir = _routing_run(tmp_path)
    out = tmp_path / "routing.svg"
    assert main(["routing", str(run_dir), "--out", str(out)]) == 0
    assert ElementTree.parse(out).getroot().tag == f"{SVG}svg"
    out = tmp_path / "all"
    assert main(["routing", str(run_dir), "--out", str(out), "--format", "csv"]) == 0
    assert {p.name for p in out.iterdir()} == {"routing.json", "routing.html", "routing.csv"}
    assert main(["report", str(tmp_path / "recipe.yaml"), "--format", "svg"]) == 0
    names = {path.name for path in (run_dir / "figures").iterdir()}
    assert names == {"losses.svg", "compute.svg", "routing.svg"}
    assert "figure:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["routing", "{run}", "--out", "{tmp}/a.svg", "--format", "csv"], "is a .svg file"),
        (["routing", "{run}", "--out", "{tmp}/no/a.svg"], "no such directory"),
        (["report", "{recipe}", "--out", "{tmp}/a"], "choose a format: --format svg"),
        (["report", "{recipe}", "--format", "svg", "--out", "{tmp}/a.svg"], "name of a directory"),
    ],
)
def test_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    run_dir = _routing_run(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    given: dict[str, Any] = {"run": run_dir, "tmp": tmp_path, "recipe": tmp_path / "recipe.yaml"}
    assert main([word.format(**given) for word in arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert json.loads((run_dir / "results.json").read_text())


@pytest.mark.parametrize("name", ["a.pdf", "a.JPG", "a.eps"])
def test_a_file_of_another_format_is_no_directory(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a format that is not written"):
        figure_files.check_formats(["svg"], tmp_path / name)
    assert list(tmp_path.iterdir()) == []
