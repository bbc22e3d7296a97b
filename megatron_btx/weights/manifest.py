"""``manifest.json``: what a checkpoint directory says of itself. Imports no torch for ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_btx.errors import UserError
from megatron_btx.files import read_json
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.fields import UTMOST, Range
from megatron_btx.recipe.read_architecture import from_manifest
from megatron_btx.recipe.typed import BAD, Reader
from megatron_btx.recipe.yaml_tree import Node, tree_of

FORMAT = "megatron_btx/1"
MANIFEST = "manifest.json"

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Special tokens of a ``config.json``, of which ``huggingface`` of a manifest keeps a copy."""
_COUNTS = ("step", "consumed_samples", "tokens")
_BESIDE: Mapping[str, Any] = {
    **dict.fromkeys(_COUNTS, int | None),
    "has_optimizer": bool,
    "layout": dict[str, Any],
    "tokenizer": dict[str, Any] | None,
    "tokenizer.type": Literal["huggingface", "sentencepiece"],
    "tokenizer.file": str,
    "tokenizer.sha256": str | None,
    "huggingface": dict[str, Any] | None,
    "huggingface.model_type": str | None,
}
"""Types of what is read of a manifest beside the architecture, by its dotted key."""
_NEEDED = ("tokenizer.type", "tokenizer.file")
"""Of those, what a block must have that is there."""


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
    architecture = from_manifest(manifest, path)
    _check_beside(manifest, path)
    return architecture, manifest


def no_token(key: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with the value of one of ``TOKENS``, and the fix, where it is neither a token's
    id nor null, nor a list of some: a text may end with several tokens, and has one of the
    others."""
    ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
    if value is None or all(type(n) is int and -1 <= n <= UTMOST for n in ids):
        return None
    return f"is {value!r:.60}, no token's id", "give a number, or null"


def _check_beside(manifest: Mapping[str, Any], path: Path) -> None:
    """That what a manifest says beside the architecture is of the types that it is used as: some
    of it goes into a result that is hours away.

    Raises:
        UserErrors: everything that is not.
    """
    reader, nodes = Reader(noun="a manifest", strict=True), tree_of(manifest, path)
    for key, hint in _BESIDE.items():
        block, _, name = key.rpartition(".")
        inside = nodes.value.get(block) if block else nodes
        if inside is None or not isinstance(inside.value, dict):
            continue
        node = inside.value.get(name)
        if node is None and key in _NEEDED:
            reader.error(Node(None, path, 0, key), "is missing", "copy the file again")
        elif node is not None and reader.value(hint, [node], key) is not BAD and key in _COUNTS:
            wrong = None if node.value is None else Range(0, UTMOST).problem(node.value)
            if wrong is not None:
                reader.error(node, *wrong)
    kept = nodes.value.get("huggingface")
    for name in TOKENS if kept is not None and isinstance(kept.value, dict) else ():
        if (wrong := no_token(name, manifest["huggingface"].get(name))) is not None:
            reader.error(kept.value[name], *wrong)
    reader.raise_errors()


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
