"""Which code this is: what an artefact's lineage records. Imports no torch."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

from megatron_btx import __version__

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "numpy", "wandb")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what computes; what is not installed is absent."""
    found = {"megatron-btx": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_revision() -> str | None:
    """Commit of the checkout this package runs from, ``+changes`` behind it where files differ;
    ``None`` for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    revision = _git(root, "rev-parse", "--short=12", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "megatron_btx")
    return revision + "+changes" if revision and changed else revision or None


def _git(root: Path, *words: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
