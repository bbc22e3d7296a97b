"""The one way from a description of a model to an :class:`Architecture`: types, ranges, and what
must go together. A manifest, a ``config.json`` and the arguments of Megatron-LM all come here, each
value with the file and the key that it stands under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.files import find_json, newest_step
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.check_layout import model_problems
from megatron_btx.recipe.fields import Range, like, within
from megatron_btx.recipe.schema import Model, Routing, TokenizerBlock
from megatron_btx.recipe.typed import BAD, Reader
from megatron_btx.recipe.yaml_tree import Node, tree_of

MOST_EXPERTS = 10_000
_MOST_FFNS = 10**6
"""Layers times experts, far above all that exists: a plan of more would not end."""


_VOCABULARY: Range = like(TokenizerBlock, "vocab_size").metadata["range"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _MoE:
    num_moe_experts: int | None = within(1, MOST_EXPERTS, default=None)
    experts: tuple[str, ...]
    routing: Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entries:
    model: Model
    vocab_size: int = within(1, _VOCABULARY.high)
    padded_vocab_size: int | None = within(1, 10**9, default=None)
    moe: _MoE | None


def read_architecture(entries: Node) -> Architecture:
    """The architecture that entries describe.

    Args:
        entries: ``model`` (fields of :class:`Model`), ``vocab_size`` and ``moe`` (nothing, or
            ``experts``, their names, and ``routing``), in the form of ``Architecture.to_json``.
            Every node below has the file and the key of the description that it was taken from.

    Raises:
        UserErrors: everything that is missing, of a wrong type, out of range or contradicts
            another, at once, each by its file and key.
    """
    reader = Reader(noun="a model", strict=True)
    found = reader.instance(_Entries, [entries], "")
    if found is not BAD:
        for key, what, fix in _contradictions(found):
            reader.error(_nearest(reader.marks, key, entries), what, fix)
    reader.raise_errors()
    return Architecture(
        model=found.model,
        vocab_size=found.vocab_size,
        experts=found.moe.experts if found.moe else (),
        routing=found.moe.routing if found.moe else None,
    )


ENTRIES = ("model", "vocab_size", "padded_vocab_size", "moe")
"""Those of a manifest that say what it is of."""


def from_manifest(manifest: Mapping[str, Any], file: Path) -> Architecture:
    """The architecture of a manifest; its other entries are ignored.

    Raises:
        UserErrors: as :func:`read_architecture`.
    """
    return read_architecture(
        tree_of({name: manifest[name] for name in ENTRIES if name in manifest}, file)
    )


def integer(node: Node, limits: Range, errors: list[UserError]) -> int | None:
    """A whole number that is needed before the rest can be read; ``None`` after noting an error."""
    reader = Reader(strict=True)
    value = reader.value(int, [node], node.key)
    wrong = None if value is BAD else limits.problem(value)
    if wrong is not None:
        value = reader.error(node, *wrong)
    errors += [error for _, error in reader.errors]
    return None if value is BAD else value


def _contradictions(found: _Entries) -> list[tuple[str, str, str]]:
    again = "copy the file again, or correct it"
    wrong = [(f"model.{key}", what, fix) for key, what, fix in model_problems(found.model)]
    multiple = found.model.make_vocab_size_divisible_by
    padded = -(-found.vocab_size // multiple) * multiple
    if found.padded_vocab_size not in (None, padded):
        what = f"is {found.padded_vocab_size}, and {found.vocab_size} padded to a multiple of"
        wrong.append(("padded_vocab_size", f"{what} {multiple} is {padded}", again))
    if found.moe is None:
        return wrong
    names, k = found.moe.experts, found.moe.routing.moe_router_topk
    if found.moe.num_moe_experts not in (None, len(names)):
        what = f"names {len(names)} experts of {found.moe.num_moe_experts}"
        wrong.append(("moe.experts", what, again))
    if not names or len(set(names)) < len(names):
        what = "has no expert" if not names else "names an expert twice"
        wrong.append(("moe.experts", what, again))
    elif len(names) * found.model.num_layers > _MOST_FFNS:
        what = f"{len(names)} experts in each of {found.model.num_layers} layers are too many"
        wrong.append(("moe.experts", what, f"give at most {_MOST_FFNS:,} in all"))
    elif found.moe.routing.type == "topk" and k > len(names):
        what = f"is {k}, of {len(names)} experts"
        wrong.append(("moe.routing.moe_router_topk", what, f"give at most {len(names)}"))
    return wrong


def _nearest(marks: Mapping[str, Node], key: str, root: Node) -> Node:
    """Where a key was written, or the block that it would stand in."""
    while key and key not in marks:
        key = key.rpartition(".")[0]
    return marks[key] if key else root


def stated_vocabulary(seed: Path) -> int | None:
    """Size of the vocabulary that comes along with a checkpoint, Megatron's or Hugging Face's;
    whether there is a whole one is asked later (pipeline/import_checkpoint.py)."""
    try:
        directory = seed if (seed / "manifest.json").exists() else newest_step(seed) or seed
        manifest = find_json(directory / "manifest.json")
        stated = (manifest or find_json(directory / "config.json") or {}).get("vocab_size")
    except (OSError, ValueError):
        return None
    return stated if type(stated) is int and _VOCABULARY.problem(stated) is None else None
