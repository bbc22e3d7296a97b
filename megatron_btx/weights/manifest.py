"""``manifest.json``: what a checkpoint directory says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.recipe.architecture import Architecture

FORMAT = "megatron_btx/1"
MANIFEST = "manifest.json"


def read_manifest(directory: Path) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that a directory declares, and all else that it says.

    Raises:
        UserError: there is no manifest, or it is damaged or of another version.
    """
    path = directory / MANIFEST
    again = "copy the checkpoint again, or take another one"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"no {MANIFEST}, so the model's shape and vocabulary are not known"
        raise UserError(str(directory), what, "give a step_XXXXXXXX directory of btx") from None
    except ValueError as error:
        raise UserError(str(path), f"damaged: {error}", again) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(str(path), f"not of the format {FORMAT}", again)
    try:
        return Architecture.from_json(manifest), manifest
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(str(path), f"damaged: {error!r}", again) from error
