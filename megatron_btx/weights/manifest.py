"""``manifest.json``: what a checkpoint directory says of itself. Imports no torch for ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import read_json
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.read_architecture import from_manifest

FORMAT = "megatron_btx/1"
MANIFEST = "manifest.json"


def read_manifest(
    directory: Path, given: Mapping[str, Any] | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that a directory declares, and all else that it says.

    Our manifest; else what Megatron-LM or Megatron-Bridge left there, completed by what is given.

    Args:
        directory: of one saved step.
        given: settings in Megatron's words, for a directory that is not ours.

    Raises:
        UserErrors: nothing says what the model is, or what does is damaged, of another version, or
            describes a model that we would compute wrongly.
    """
    path = directory / MANIFEST
    again = "copy the checkpoint again, or take another one"
    if not path.exists():
        return _declared(directory, given or {})
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise UserError(str(path), f"not of the format {FORMAT}", again)
    return from_manifest(manifest, path), manifest


def _declared(directory: Path, given: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any]]:
    # Here, because it imports torch, which our own manifests need not.
    from megatron_btx.weights.megatron_lm_args import architecture_of, refuse_unknown, settings_of

    found = settings_of(directory)
    if found is None and not given:
        what = f"no {MANIFEST}, no run_config.yaml and no arguments of Megatron-LM in common.pt"
        fix = (
            "say what the model is under `model:` in a file, and copy it with that: btx mix "
            "--method copy --format megatron --config FILE"
        )
        raise UserError(str(directory), what, fix)
    refuse_unknown(given, str(directory))
    settings = {**(found or {}), **given}
    architecture = architecture_of(settings, str(directory))
    return architecture, {"tokens": settings.get("tokens")}
