"""Undo what a failed run has changed, unless it has made something worth keeping. Imports no
torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from megatron_btx.pipeline import state
from megatron_btx.pipeline.graph import Stage
from megatron_btx.pipeline.local.progress import ProgressView

_FILES = ("recipe.yaml", "lock", "fingerprints.json", "results.json", "report.html")
"""What a run writes beside its stages."""


class Rollback:
    """A run that fails by a mistake in its input before it has made anything worth keeping has
    changed nothing: what it made is removed, a stage that it set aside is back in its place, the
    recipe kept beside it is the former one. Whatever was saved on the way keeps all of it."""

    def __init__(self, run_dir: Path, stages: tuple[Stage, ...], view: ProgressView) -> None:
        self.wanted = False
        """Whether the run is failing by such a mistake."""
        self.set_aside: dict[Path, Path] = {}
        """Directories of stages, and where under ``old/`` their former content is."""
        self.run_dir, self.stages, self.view = run_dir, stages, view
        self._made: list[Path] = []
        self._entries: set[Path] | None = None
        self._saved: set[tuple[Path, int]] = set()
        self._recipe: bytes | None = None

    def __enter__(self) -> Rollback:
        self._made = state.make(self.run_dir)
        return self

    def arm(self) -> None:
        """Note what is there. Only once the directory is locked: what appears in it before that
        may be another run's."""
        self._entries = set() if self._made else set(self.run_dir.iterdir())
        self._saved = state.saved(self.run_dir, self.stages)
        recipe = self.run_dir / "recipe.yaml"
        self._recipe = recipe.read_bytes() if recipe.exists() else None

    def __exit__(self, *_: object) -> None:
        if self.wanted and self._entries is not None and not self._anything_saved():
            self._put_back()
            recipe = self.run_dir / "recipe.yaml"
            if self._recipe is not None and recipe.read_bytes() != self._recipe:
                recipe.write_bytes(self._recipe)
            for entry in set(self.run_dir.iterdir()) - self._entries:
                if self._ours(entry.name):
                    _remove(entry)
        for path in self._made:  # those that are empty
            with contextlib.suppress(OSError):
                path.rmdir()

    def _ours(self, name: str) -> bool:
        """Whether a run makes an entry of this name: what else has appeared is a user's."""
        stages = {stage.directory for stage in self.stages}
        return name in {*_FILES, *stages}

    def _anything_saved(self) -> bool:
        return not state.saved(self.run_dir, self.stages) <= self._saved

    def _put_back(self) -> None:
        for place, aside in self.set_aside.items():
            _remove(place)
            os.rename(aside, place)
            self.view.note(f"{place.name}: what was kept in {aside} is back in its place")
            with contextlib.suppress(OSError):  # others are kept there
                aside.parent.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
