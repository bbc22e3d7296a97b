"""The final table on a terminal and elsewhere."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest

from megatron_btx.evaluate.results import Results
from megatron_btx.report import table
from megatron_btx.report.figure_labels import Box, place
from megatron_btx.report.figure_svg import thin, ticks
from tests.report.made import make_run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = Results.read(make_run(tmp_path_factory.mktemp("made"))[1])
    assert found is not None
    return found.to_json()


def read(content: dict[str, Any]) -> Results:
    return Results.from_json(content, "results.json")


def test_plain_text(results: dict[str, Any]) -> None:
    stream = io.StringIO()
    table.show(read(results), stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].split()[-5:] == ["general", "code", "math", "prose", "mean"]
    assert lines[1].split() == ["seed", "3.410", "2.630", "1.520", "3.640", "2.800"]
    assert lines[2].split() == ["code", "expert", "3.620", "2.310*", "1.830", "3.970", "2.933"]
    assert lines[6].split()[1:] == ["3.330*", "2.360", "1.250", "3.440", "2.595*"]
    assert "\x1b" not in stream.getvalue()


def test_colours_on_a_terminal(results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    table.show(read(results), stream)
    assert "\x1b[" in stream.getvalue()
    assert "2.310*" in stream.getvalue()


def test_equal_losses_are_both_the_best(results: dict[str, Any]) -> None:
    results = copy.deepcopy(results)
    results["systems"]["dense"]["loss"]["mean"] = results["systems"]["btx"]["loss"]["mean"] + 1e-5
    assert table.best(read(results))["mean"] == {"btx", "dense"}


@pytest.mark.parametrize(
    ("gap", "words"),
    [
        (-0.02, "Branch-Train-MiX is ahead of the dense baseline: its mean held-out loss is 0.020"),
        (0.02, "The dense baseline is ahead of Branch-Train-MiX: its mean held-out loss is 0.020"),
        (-0.006, "Branch-Train-MiX is ahead of the dense baseline"),
        (0.004, "Branch-Train-MiX and the dense baseline are level: their mean held-out"),
        (0.0, "Branch-Train-MiX and the dense baseline are level"),
    ],
)
def test_the_verdict_goes_either_way(results: dict[str, Any], gap: float, words: str) -> None:
    results = copy.deepcopy(results)
    systems = results["systems"]
    systems["btx"]["loss"] = {k: v + gap for k, v in systems["dense"]["loss"].items()}
    verdict = table.verdict(read(results))
    assert verdict.startswith(words)
    assert ("every domain" in verdict) == (gap < 0)
    assert ("no domain" in verdict) == (gap >= 0)
    del systems["dense"]
    assert table.verdict(read(results)) == ""


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (11_000_000, "training compute, on the same number of tokens."),
        (12_300_000, "compute, on 12.3M tokens, the dense baseline on 11M."),
        (None, None),
    ],
)
def test_the_same_tokens_are_claimed_only_of_the_same(
    results: dict[str, Any], tokens: int | None, words: str | None
) -> None:
    """Of a model that was taken and does not say what it was trained on, nothing is claimed."""
    results = copy.deepcopy(results)
    btx = results["systems"]["btx"]
    btx["train_tokens"] = tokens
    if tokens is None:
        btx |= {"train_flops": None, "stages": {"expert:code": {"tokens": None, "flops": None}}}
    stream = io.StringIO()
    table.show(read(results), stream)
    said = stream.getvalue()
    if words is None:
        assert "times" not in said
        assert "taken as code expert does not say how many tokens it was trained on" in said
    else:
        assert said.endswith(f"{words}\n")


def test_how_experts_were_taken_is_named(results: dict[str, Any]) -> None:
    results = copy.deepcopy(results)
    results["systems"]["btx"]["expert_choice"] = "argmax"
    assert table.notes(read(results)) == [
        "Branch-Train-MiX: one expert a token, the argmax of its logits."
    ]


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 3, 5) == [0, 1, 2, 3]
    assert ticks(2.513, 3.13, 5) == [2.6, 2.8, 3.0]
    assert ticks(5, 5, 5) == [5]


def test_labels_lie_neither_on_dots_nor_on_each_other() -> None:
    """Twenty dots in a crowd, and one at the edge, whose label has room on its left only."""
    dots = [(100 + 7.0 * (n % 5), 100 + 6.0 * n) for n in range(20)] + [(390.0, 20.0)]
    names = [f"system_{n}" for n in range(21)]
    boxes = place(dots, names, Box(0, 0, 400, 320))
    marks = [Box(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for number, box in enumerate(boxes):
        assert box.within(Box(0, 0, 400, 320))
        assert not any(box.meets(other) for other in [*marks, *boxes[:number]])
    assert boxes[0].top < 100 < boxes[0].bottom, "the first has the best place"
    assert boxes[20].right < 390
    assert len(place([(50.0, 50.0)] * 9, ["one"] * 9, Box(0, 0, 60, 60))) == 9, "no room: no end"


def test_thinning_keeps_the_course_and_the_end() -> None:
    points = [(float(x), 3.0 + 1 / (x + 1)) for x in range(10_000)]
    kept = thin(points, 100)
    assert len(kept) == 100
    assert kept[-1][0] == 9999
    assert thin(points[:50], 100) == points[:50]


def test_short_heldout_text_is_told() -> None:
    text = {"code": {"tokens": 3120}, "math": {"tokens": 131_072}, "web": {}}
    (line,) = table.notes(Results(recipe="r", domains=(), systems={}, text=text))
    assert line.startswith("Held-out text is short: code 3,120 tokens.")
