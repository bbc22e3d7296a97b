"""Every key of a recipe with its type, default, range and meaning, from the schema alone; and a
model as a recipe's block.

``python -m megatron_btx.recipe.key_reference`` prints docs/recipe.md; ``btx keys [PREFIX]`` a part
of it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_btx.recipe.fields import field_docs
from megatron_btx.recipe.messages import describe, options, yaml_name
from megatron_btx.recipe.schema import Layout, MegatronOptions, Model, Recipe, SlurmJob, Training

_HEAD = """# Every key of a recipe

Made from the schema by `python -m megatron_btx.recipe.key_reference > docs/recipe.md`; a test holds
it current. `btx keys finetune` prints a part of it in the terminal, `btx plan RECIPE` checks a
recipe.

- **Numbers**: `4_000_000`, `4e6`, `1e-4`; counts also with a suffix, small or capital: `60k`, `4M`,
  `80B` (or `80G`), `2T`. A number outside its range is an error with the line where it stands.
- **Paths** (marked *path*) are relative to the directory of the file in which they are written; `~`
  is the home directory. A run that was begun under the directory in which `btx` is started, where
  earlier releases put it, is still found there.
- **Inheritance**: `training:` at the top holds any key of a training stage, as the default of
  `seed`, `experts.*`, `finetune` and `dense`; `"*":` in `experts` those of every expert.
  `base: other.yaml` starts from another recipe. All work key by key; a mixture (`data`) is one
  value, and what a block says itself counts before what it inherits.
- An empty value (`null`) means the default, where the type has no other meaning for it.
- A key that is written twice is an error, and so is one that does not exist."""
_ALIKE = {Training: "training", Layout: "layout", MegatronOptions: "megatron", SlurmJob: "job"}
"""Blocks that stand in several places: told once, under this heading."""
_STEPS = "Another way to say `tokens`: steps of `global_batch_size` sequences; one of the two."


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    name: str
    """Dotted; ``*`` stands for any name, ``training`` for any training stage."""
    type: str
    default: str
    range: str
    meaning: str


def all_keys() -> list[Key]:
    """Every key, block after block; what several blocks have in common follows once."""
    found = list(_of(Recipe, ""))
    for cls, name in _ALIKE.items():
        found += _of(cls, name)
    return found


def matching(prefix: str) -> list[Key]:
    """The keys under a prefix: ``model``, ``finetune.lr``, ``lr``. A stage's are those of any."""
    prefix = re.sub(r"^(seed|finetune|dense|experts(\.[^.]+)?)\b", "training", prefix.strip("."))
    prefix = re.sub(r"^(training|evaluate)\.(layout|megatron)", r"\2", prefix)
    if not prefix:
        return all_keys()
    return [
        key
        for key in all_keys()
        if key.name == prefix
        or key.name.startswith(prefix + ".")
        or key.name.endswith("." + prefix)
    ]


def as_markdown() -> str:
    """The page docs/recipe.md."""
    lines = [_HEAD]
    block = None
    for key in all_keys():
        here = key.name.rpartition(".")[0]
        if here != block:
            block = here
            lines += ["", f"## {_heading(block)}", "", "| key | type | default | range | |"]
            lines += ["| --- | --- | --- | --- | --- |"]
        name = key.name.rpartition(".")[2]
        cells = (f"`{name}`", key.type, key.default, key.range, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_text(found: list[Key]) -> str:
    """For a terminal: a key a line, its meaning below."""
    lines = []
    for key in found:
        facts = [key.type, f"default {key.default}" if key.default else "", key.range]
        lines.append(f"{key.name}: {'; '.join(filter(None, facts))}".replace("`", ""))
        lines.append(f"    {key.meaning}")
    return "\n".join(lines) + "\n"


def _heading(block: str) -> str:
    names = {
        "": "At the top",
        "training": "`seed`, `experts.*`, `finetune`, `dense`; their defaults in `training`",
        "layout": "`layout` of a stage and of `evaluate`",
        "megatron": "`megatron` of a stage",
        "job": "`slurm`, and `slurm.stages.*` for one kind of stage or one stage",
    }
    return names.get(block, f"`{block}`")


def _of(cls: Any, key: str) -> Iterator[Key]:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    inherited = {one.name for one in dataclasses.fields(SlurmJob)} if key == "slurm" else set()
    below: list[tuple[Any, str]] = []
    if cls is Recipe:
        yield Key("base", "text *path*", "", "", "Another recipe from which this one starts.")
        yield Key("training", "a block of keys", "", "", "Defaults of every training stage.")
    for one in dataclasses.fields(cls):
        if one.name in inherited:
            continue
        name = f"{key}.{yaml_name(one.name)}".lstrip(".")
        hint = hints[one.name]
        limits = str(one.metadata.get("range", ""))
        kind = describe(hint) + (" *path*" if one.metadata.get("path") else "")
        yield Key(name, kind, _default(one), limits, _plain(docs[one.name]))
        if name == "training.tokens":
            yield Key("training.steps", "a whole number", "", "at least 1", _STEPS)
        for option in options(hint):
            inner, place = option, name
            if typing.get_origin(option) is dict:
                inner, place = typing.get_args(option)[1], f"{name}.*"
            if dataclasses.is_dataclass(inner) and inner not in _ALIKE:
                below.append((inner, place))
    for inner, place in below:
        yield from _of(inner, place)


def _default(one: Any) -> str:
    if one.default_factory is not dataclasses.MISSING or dataclasses.is_dataclass(one.default):
        return ""
    if one.default is dataclasses.MISSING:
        return "required"
    if one.default is None:
        return "`null`"
    value = list(one.default) if isinstance(one.default, tuple) else one.default
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _plain(text: str) -> str:
    """A docstring as one line of Markdown."""
    return re.sub(r"\s+", " ", text).replace("``", "`").replace("`None`", "`null`").strip()


def model_block(model: Model) -> str:
    """YAML that says what differs from the defaults, ready to paste."""
    lines = ["model:"]
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if value != field.default:
            lines.append(f"  {field.name}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
