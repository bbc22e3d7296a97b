"""A model as the ``model:`` block of a recipe."""

from __future__ import annotations

import dataclasses
import json

from megatron_btx.recipe.schema import Model


def model_block(model: Model) -> str:
    """YAML that says what differs from the defaults, ready to paste."""
    lines = ["model:"]
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default:
            lines.append(f"  {field.name}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"
