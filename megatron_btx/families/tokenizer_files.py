"""A tokenizer's files, carried along and compared; nothing here knows how they tokenize."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_DEFINING = (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model"))
_OTHERS = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_INFO = "tokenizer_info.json"


def describe_tokenizer(directory: Path) -> dict[str, str] | None:
    """``{"type", "file", "sha256"}`` of the tokenizer in a Hugging Face directory, as manifests say
    it; ``None`` where there is none."""
    for kind, name in _DEFINING:
        path = directory / name
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            return {"type": kind, "file": name, "sha256": digest}
    return None


def tokenizer_files(directory: Path, *, megatron: bool) -> dict[str, bytes]:
    """The tokenizer of a checkpoint of either format, for a result of either format.

    Args:
        directory: a Hugging Face directory (files beside the weights) or a step directory of ours
            (files in ``tokenizer/``).
        megatron: whether the result is a step directory.

    Returns:
        Contents by path within the result; empty where the checkpoint has no tokenizer.
    """
    own = directory / "tokenizer"
    place = own if own.is_dir() else directory
    names = [name for _, name in _DEFINING] + list(_OTHERS)
    found = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
    described = describe_tokenizer(place)
    if not megatron or described is None:
        return found
    found[_INFO] = (json.dumps(described, indent=1) + "\n").encode()
    return {f"tokenizer/{name}": content for name, content in found.items()}
