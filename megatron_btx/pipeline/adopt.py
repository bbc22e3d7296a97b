"""Stages whose model is taken as it is: ``seed: {from: DIR}``, and experts of zero tokens.

The checkpoint is checked and linked where the stage would have left its own, so that nothing behind
it can tell the difference. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.pipeline import graph, state
from megatron_btx.recipe.schema import Model, Recipe

_FREE = frozenset({"seq_length", "init_method_std"})
"""Fields of ``Model`` in which a checkpoint may differ: they shape no weight and no result."""


def check(recipe: Recipe, name: str) -> None:
    """See that the checkpoint for stage ``name`` is there and is of the recipe's model.

    Raises:
        UserError: it is missing, incomplete, a mixture of experts or of another shape.
    """
    source = graph.imported(recipe, name)
    assert source is not None
    if source != "seed":
        _read(recipe, f"{name.replace(':', '.')}.from", Path(source))


def link(recipe: Recipe, name: str, run_dir: Path) -> dict[str, Any]:
    """Link the checkpoint into the stage's own ``checkpoints/``.

    Returns:
        ``{"checkpoint": link, "from": what it points to}``.
    """
    source = graph.imported(recipe, name)
    assert source is not None
    origin = run_dir / "seed" if source == "seed" else Path(source)
    directory, manifest = _read(recipe, f"{name.replace(':', '.')}.from", origin)
    checkpoints = run_dir / name.replace(":", "-") / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / f"step_{int(manifest['step']):08d}"
    temporary = checkpoints / f".{target.name}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    inside = source == "seed"  # relative: the run's directory may be moved
    temporary.symlink_to(os.path.relpath(directory, checkpoints) if inside else directory.resolve())
    os.replace(temporary, target)
    return {"checkpoint": str(target.relative_to(run_dir)), "from": str(directory)}


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: itself, or the newest under it or its ``checkpoints/``."""
    if (path / "manifest.json").is_file():
        return path
    for parent in (path / "checkpoints", path):
        steps = sorted(parent.glob("step_????????"))
        if steps:
            return steps[-1]
    return path


def _read(recipe: Recipe, where: str, path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_dir():
        raise UserError(where, f"{path} is not a directory", "give a checkpoint's directory")
    directory = newest_checkpoint(path)
    manifest = state.read_json(directory / "manifest.json")
    if manifest is None:
        raise UserError(
            where,
            f"{directory} has no readable manifest.json",
            "give a step_XXXXXXXX directory written by this project, or convert with tools/convert",
        )
    payload = [item for item in directory.glob("*.distcp") if item.stat().st_size > 0]
    if not payload or not (directory / ".metadata").is_file():
        raise UserError(where, f"{directory} is not whole", "copy the checkpoint again")
    if manifest.get("moe") is not None:
        raise UserError(where, f"{directory} is a mixture of experts", "give a dense checkpoint")
    different = [
        f"{field}: {theirs} there, {ours} here"
        for field, theirs, ours in _differences(manifest.get("model") or {}, recipe.model)
    ]
    if different:
        raise UserError(
            where,
            f"{directory} is of another model ({'; '.join(different)})",
            "change `model:` to the checkpoint's, or take another checkpoint",
        )
    return directory, manifest


def _differences(theirs: dict[str, Any], model: Model) -> list[tuple[str, Any, Any]]:
    ours = _resolved(dataclasses.asdict(model))
    theirs = _resolved({**ours, **theirs})
    return [
        (name, theirs[name], ours[name])
        for name in ours
        if name not in _FREE and theirs[name] != ours[name]
    ]


def _resolved(model: dict[str, Any]) -> dict[str, Any]:
    """With the two defaults that follow from other fields filled in."""
    heads = model["num_attention_heads"]
    groups = model.get("num_query_groups") or heads
    width = model.get("kv_channels") or model["hidden_size"] // heads
    return {**model, "num_query_groups": groups, "kv_channels": width}
