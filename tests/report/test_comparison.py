"""What the comparison sets side by side, and what it refuses to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.errors import UserError
from megatron_btx.report import comparison
from megatron_btx.report.comparison import FinishedRun
from tests.report.made import make_run


def two(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> list[FinishedRun]:
    """Two runs of one recipe; the second one's results.json is changed."""
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        recipe, run_dir = make_run(tmp_path / name)
        runs.append(FinishedRun(recipe=recipe, run_dir=run_dir))
    path = runs[1].run_dir / "results.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return runs


def test_losses_of_the_same_text(tmp_path: Path) -> None:
    made = comparison.compare(two(tmp_path, lambda results: None))
    assert made.columns == ("general", "code", "math", "prose", "mean")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["text"]["code"].update(tokens=61440), r"other text of code \(61,440 tokens\)"),
        (
            lambda r: r["text"]["math"].update(sha256="f" * 64),
            "was evaluated on other text of math",
        ),
        (lambda r: r.pop("text"), "does not say which held-out text"),
        (lambda r: r["domains"].reverse(), "compare recipes with the same domains"),
    ],
)
def test_losses_of_other_text_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        comparison.compare(two(tmp_path, change))
