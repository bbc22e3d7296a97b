"""What a stage makes, as an artifact that others can name: files where they lie, their hashes, and
what they are. Imports no torch, and no W&B (tracking.py tells it)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.files import find_json
from megatron_btx.recipe.stages import directory
from megatron_btx.weights.file_hashes import ALGORITHM, HASHES, hash_file, hashes_of
from megatron_btx.weights.find_checkpoint import find_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """By reference: nothing of it is copied."""

    name: str
    type: str
    """``dataset``, ``model``, ``mix`` or ``results``."""
    root: Path
    """The directory that the files' names are relative to; absolute."""
    files: Mapping[str, str]
    """Name -> hash (weights/file_hashes.py)."""
    metadata: Mapping[str, Any]


_TYPES = {"prepare": "dataset", "mix": "mix", "evaluate": "results"}
"""By kind of stage; all others make models."""


def made_by(stage: str, recipe_name: str, run_dir: Path) -> Artifact:
    """What a finished stage has made.

    Args:
        stage: ``prepare``, ``seed``, ``expert:math``, ``mix``, ``finetune``, ``export``, ...
        recipe_name: part of the artifacts' names.
        run_dir: of the run.

    Raises:
        UserError: its checkpoint is missing, or its ``hashes.json`` damaged.
        OSError: a file cannot be read.
    """
    place, kind = directory(run_dir, stage), stage.partition(":")[0]
    root, names = _files(kind, place)
    hashes = hashes_of(root)
    if not hashes:  # small, or by a version that wrote none
        hashes = {name: hash_file(root / name) for name in names}
    elif (root / HASHES).exists():
        hashes = {**hashes, HASHES: hash_file(root / HASHES)}
    return Artifact(
        name=re.sub(r"[^\w.-]", "-", f"{recipe_name}-{stage}"),
        type=_TYPES.get(kind, "model"),
        root=root.resolve(),
        files=hashes,
        metadata={
            "stage": stage,
            "key": (find_json(place / "stage.json") or {}).get("key"),
            "directory": str(root.resolve()),
            "hash": ALGORITHM,
        },
    )


def _files(kind: str, place: Path) -> tuple[Path, list[str]]:
    """Where a kind of stage leaves what it makes, and its files where no ``hashes.json`` does."""
    if kind == "prepare":  # what was made of each domain is hashed there
        found = [*place.glob("data/*/*.json"), *place.glob("tokenizer/*"), place / "data.json"]
        return place, sorted(str(path.relative_to(place)) for path in found)
    if kind == "mix":
        return place, ["plan.json"]
    if kind == "evaluate":
        return place.parent, ["results.json"]
    root = place / "hf" if kind == "export" else find_checkpoint(place)
    return root, sorted(path.name for path in root.iterdir() if path.is_file())


def used_by(stage: str, needs: Iterable[str]) -> list[str]:
    """The stages whose artifacts a stage uses: what it waits for; of a finetuning the mix, which
    stands for the models it is of.

    Args:
        stage: its name.
        needs: the stages that it waits for.
    """
    if stage == "finetune" and "mix" in needs:
        return [need for need in needs if need in ("prepare", "mix")]
    return [need for need in needs if need != "report"]
