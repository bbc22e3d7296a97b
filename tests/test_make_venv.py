"""``tools/make_venv.sh``, which `make demo` begins with, on machines that have other Pythons."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "make_venv.sh"

PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) echo "{version}" ;;
  *ensurepip*) exit {without_venv} ;;
  "-m venv --clear "*) /bin/mkdir "$4"; echo "{version}" > "$4/made_by" ;;
  *) exit 9 ;;
esac
"""


def make(directory: Path, pythons: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The script where these programs are all that is on the PATH: name -> what it is, ``"3.12"``,
    ``"3.12 without venv"``, or ``"nothing"`` for a wrapper around none."""
    programs = directory / "bin"
    programs.mkdir()
    for name, what in pythons.items():
        version, _, missing = what.partition(" ")
        text = PYTHON.format(version=version, without_venv=int(bool(missing)))
        (programs / name).write_text("#!/bin/sh\nexit 127\n" if what == "nothing" else text)
        (programs / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(SCRIPT), str(directory / "venv")],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3": "3.10"}, "3.10"),
        ({"python": "3.11"}, "3.11"),
        ({"python3.11": "3.11", "python3": "3.12", "python3.10": "3.10"}, "3.12"),
        ({"python3": "3.14", "python3.12": "3.12"}, "3.12"),
        ({"python3.13": "nothing", "python3.11": "3.11"}, "3.11"),
        ({"python3.13": "3.13 without venv", "python3.11": "3.11"}, "3.11"),
    ],
)
def test_the_newest_that_can(tmp_path: Path, pythons: dict[str, str], taken: str) -> None:
    done = make(tmp_path, pythons)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "venv" / "made_by").read_text().strip() == taken
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("pythons", "words"),
    [
        ({}, "apt-get install python3 python3-venv"),
        ({"python3.13": "nothing", "python3": "nothing"}, "apt-get install python3 python3-venv"),
        (
            {"python3": "3.14", "python": "3.14"},
            "(python3 is 3.14): install one (Debian, Ubuntu: apt-get install python3.13 ",
        ),
        ({"python3": "3.9"}, "(python3 is 3.9): install one"),
        (
            {"python3": "3.12 without venv", "python3.10": "3.10 without venv"},
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
