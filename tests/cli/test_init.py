"""``btx init``: examples written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.cli.init import example_names
from megatron_btx.cli.main import main
from megatron_btx.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", example_names())
def test_an_example_is_whole_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--example", name]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.read_bytes() == (ROOT / path.relative_to(tmp_path)).read_bytes()
        if path.suffix == ".yaml" and path.name not in ("base.yaml", "model.yaml"):
            load_recipe(path)
    assert main(["init", "--example", name]) == 0, "what is there already is right"


def test_nothing_of_a_user_s_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "examples" / "demo" / "recipe.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\n")
    assert main(["init", "--example", "tiny", "demo"]) == 2
    assert "examples/demo/recipe.yaml: is something else already" in capsys.readouterr().err
    assert mine.read_text() == "name: mine\n"
    assert not (tmp_path / "examples" / "tiny").exists()
    assert main(["init", "--example", "demo", "--out", "new"]) == 0
    recipe = tmp_path / "new" / "examples" / "demo" / "recipe.yaml"
    assert load_recipe(recipe).run_dir == str(tmp_path / "new" / "runs" / "demo")


def test_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an example on files: first its files."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--example", "tiny"]) == 0
    assert "next: btx plan examples/tiny/recipe.yaml" in capsys.readouterr().out
    assert main(["init", "--example", "tiny_files"]) == 0
    assert "recipe.yaml names files that are not there yet: see the com" in capsys.readouterr().out


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--example", "dmo"]) == 2
    said = capsys.readouterr().err
    assert "there is no such example" in said
    assert "did you mean" in said
    assert "demo, four_domains" in said
    assert main(["init"]) == 2
    assert "--seed DIR or --example NAME" in capsys.readouterr().err
