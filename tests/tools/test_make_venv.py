"""``tools/make_venv.sh``, which `make demo` begins with, on machines that have other Pythons."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "make_venv.sh"

PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo "{version}" ;;
  *ensurepip*) exit {without_venv} ;;
  "-m venv --clear "*) /bin/mkdir "$4"; echo "{version}" > "$4/made_by" ;;
  *) exit 9 ;;
esac
"""


UV = """#!/bin/sh
[ "$*" = "python find --no-python-downloads 3.12" ] && echo "{python}"
"""


def make(
    directory: Path, pythons: dict[str, str], version: str | None = None
) -> subprocess.CompletedProcess[str]:
    """The script where these programs are all there is: name -> what it is, ``"3.12"``, ``"3.12
    without venv"``, or ``"nothing"`` for a wrapper around none. A name is one on the PATH, below
    ``pyenv/`` one of pyenv's, or ``uv``, which knows of a 3.12 only."""
    programs, pyenv = directory / "bin", directory / "pyenv"
    programs.mkdir()
    for name, what in pythons.items():
        of_version, _, missing = what.partition(" ")
        text = PYTHON.format(version=of_version, without_venv=int(bool(missing)))
        path = directory / name if name.startswith("pyenv/") else programs / name
        if name == "uv":
            path.write_text(UV.format(python=directory / "uv-python"))
            path.chmod(0o755)
            path = directory / "uv-python"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\nexit 127\n" if what == "nothing" else text)
        path.chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(SCRIPT), str(directory / "venv"), *([version] if version else [])],
        env={"PATH": str(programs), "PYENV_ROOT": str(pyenv)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": "3.11"}, "3.11"),
        ({"python": "3.12"}, "3.12"),
        ({"python3.11": "3.11", "python3": "3.12", "python3.10": "3.10"}, "3.12"),
        ({"python3": "3.14", "python3.12": "3.12"}, "3.12"),
        ({"python3.13": "nothing", "python3.11": "3.11"}, "3.11"),
        ({"python3.13": "3.13 without venv", "python3.11": "3.11"}, "3.11"),
        ({"python3.13": "nothing", "pyenv/versions/3.13.0/bin/python": "3.13"}, "3.13"),
        ({"python3": "3.11", "uv": "3.12"}, "3.12"),
    ],
)
def test_the_newest_that_can(tmp_path: Path, pythons: dict[str, str], taken: str) -> None:
    done = make(tmp_path, pythons)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "made_by").read_text().strip() == taken
    assert done.stderr == ""


@pytest.mark.parametrize(
    "pythons",
    [
        {"python3": "3.13", "python3.12": "3.12"},
        {"python3.12": "nothing", "pyenv/versions/3.12.1/bin/python": "3.12", "python3": "3.13"},
        {"python3.13": "3.13", "uv": "3.12"},
    ],
)
def test_the_one_that_is_asked_for(tmp_path: Path, pythons: dict[str, str]) -> None:
    done = make(tmp_path, pythons, "3.12")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "made_by").read_text().strip() == "3.12"


@pytest.mark.parametrize("program", ["{bin}/mine", "python3.12"])
def test_a_program_that_is_asked_for(tmp_path: Path, program: str) -> None:
    """By its path, or its name on the PATH; no other is looked for."""
    pythons = {"mine": "3.12", "python3.12": "3.12", "python3": "3.13"}
    done = make(tmp_path, pythons, program.format(bin=tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "made_by").read_text().strip() == "3.12"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("3.14", "(it is 3.14)"),
        ("nothing", "(it is nothing that runs)"),
        ("3.12 without venv", "Python 3.12 has no 'venv': install it"),
    ],
)
def test_a_program_that_cannot(tmp_path: Path, what: str, words: str) -> None:
    done = make(tmp_path, {"mine": what, "python3": "3.13"}, str(tmp_path / "bin" / "mine"))
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("pythons", [{}, {"python3": "3.13", "python3.11": "3.11"}])
def test_the_one_that_is_asked_for_is_not_there(tmp_path: Path, pythons: dict[str, str]) -> None:
    done = make(tmp_path, pythons, "3.12")
    assert done.returncode == 1
    assert done.stderr.startswith("no Python 3.12 was found on the PATH, in pyenv or by uv ")
    assert "apt-get install python3.12 python3.12-venv" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ({}, "apt-get install python3 python3-venv"),
        ({"python3.13": "nothing", "python3": "nothing"}, "apt-get install python3 python3-venv"),
        (
            {"python3": "3.14", "python": "3.14"},
            "(python3 is 3.14): install one (Debian, Ubuntu: apt-get install python3.13 ",
        ),
        ({"python3": "3.10"}, "(python3 is 3.10): install one"),
        (
            {"python3": "3.12 without venv", "python3.11": "3.11 without venv"},
            "Python 3.12 has no 'venv': install it (Debian, Ubuntu: apt-get install "
            "python3.12-venv)",
        ),
    ],
)
def test_what_to_install_where_none_can(
    tmp_path: Path, pythons: dict[str, str], words: str
) -> None:
    done = make(tmp_path, pythons)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()
