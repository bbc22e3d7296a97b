"""The other Python of a checkout where `.ci/run` has made both: it has the other Megatron-Core."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
_PLACES = (".venv-3.11", ".venv-3.12", ".venv")


def other_python() -> Path:
    """Its program; skips the test where there is none."""
    for place in _PLACES:
        python = TOP / place / "bin" / "python"
        if python.exists() and python.parent.parent != Path(sys.prefix) and _is_other(python):
            return python
    wanted = "3.12" if sys.version_info < (3, 12) else "3.11"
    pytest.skip(
        f"needs a Python {wanted} beside this one: make VENV=.venv-{wanted} PYTHON={wanted}"
    )


def _is_other(python: Path) -> bool:
    code = "import sys, megatron.core; print(sys.version_info >= (3, 12))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == str(sys.version_info < (3, 12))


def run_module(python: Path, module: str, *words: object, timeout: float = 600) -> str:
    """What ``python -m module words`` prints on its last line; an assertion where it fails."""
    done = subprocess.run(
        [python, "-W", "ignore", "-m", module, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=TOP,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]
