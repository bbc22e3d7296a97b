"""The page (stub)."""

from pathlib import Path

from megatron_btx.recipe.schema import Recipe


def write(recipe: Recipe, run_dir: Path) -> Path:
    """Write ``report.html``."""
    path = run_dir / "report.html"
    path.write_text("<!doctype html>", encoding="utf-8")
    return path
