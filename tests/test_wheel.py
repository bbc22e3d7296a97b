"""What ``pip install`` of the wheel gives, in an environment of its own, away from a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_btx.families import open_hf
from megatron_btx.weights.source import read_whole
from tests.families.made import make

pytest.importorskip("transformers")
pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SOURCES = ("megatron_btx", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")

PROGRAM = """
import sys
from pathlib import Path

import megatron_btx
from megatron_btx.cli.main import main

assert Path(megatron_btx.__file__).is_relative_to(sys.prefix), megatron_btx.__file__
for line in sys.stdin.read().splitlines():
    print("$", line)
    code = main(line.split())
    assert code == 0, (line, code)
"""


def _pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build gets in."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns(
                "__pycache__", "runs", "data" if name[0] == "e" else ""
            )
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=skipped)
        else:
            shutil.copy(ROOT / name, copy / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "-w", copy / "dist", copy)
    (built,) = (copy / "dist").glob("megatron_btx-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin/`` of an environment with the wheel, whose other packages are this one's."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    _pip("--python", place / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return place / "bin"


def _environ() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("megatron_btx/")}
    package = ROOT / "megatron_btx"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    kinds = (".yaml", ".py", ".md")
    wanted |= {
        f"megatron_btx/{path.relative_to(ROOT).as_posix()}"
        for path in [*EXAMPLES.glob("*"), *EXAMPLES.glob("*/*")]
        if path.is_file() and path.suffix in kinds
    }
    assert wanted <= there, sorted(wanted - there)


def test_it_plans_converts_and_mixes(installed: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    for label in ("code", "math"):
        make("llama", models / label)
    empty = tmp_path / "empty"
    empty.mkdir()
    commands = f"""init --example demo systems
plan examples/demo/recipe.yaml
plan examples/systems/btx_top2.yaml
convert hf-to-megatron {models / "code"} megatron
convert megatron-to-hf megatron back
convert megatron-lm-args megatron
mix --sources code=megatron math={models / "math"} --out moe
verify moe
submit examples/demo/recipe.yaml --dry-run --scripts"""
    done = subprocess.run(
        [installed / "python", "-c", PROGRAM],
        input=commands,
        cwd=empty,
        env=_environ(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert (empty / "examples/demo/recipe.yaml").read_bytes() == (
        EXAMPLES / "demo/recipe.yaml"
    ).read_bytes()
    one, back = (open_hf(path, "m") for path in (models / "code", empty / "back"))
    for name in one.tensors:
        assert torch.equal(read_whole(one.source, name), read_whole(back.source, name)), name
    assert (empty / "moe" / "config.json").is_file()
    said = done.stdout
    assert "--num-layers 4" in said
    body = (ROOT / "megatron_btx/pipeline/slurm/batch.sh").read_text()
    assert body in said


def test_btx_is_on_the_path(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "btx", "init", "--list"],
        cwd=tmp_path,
        env=_environ(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "demo" in done.stdout.split()
