"""A finished model as a self-contained Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_btx.errors import UserError
from megatron_btx.families.hf import family_of, to_hf, wanted
from megatron_btx.families.llama_cpp import without_misread
from megatron_btx.weights.directory import as_json
from megatron_btx.weights.execute import ONE_BY_ONE, Execution
from megatron_btx.weights.manifest import TOKENS
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.write_safetensors import SHARD, write_safetensors

CARRIED = ("model_type", *TOKENS)
"""Of a model's ``config.json``, what its Megatron checkpoint keeps (``huggingface`` of the
manifest), so that it can go out as what it came in."""


def carried(model: Checkpoint) -> dict[str, Any]:
    """What a checkpoint of either format knows of its ``config.json`` beside the architecture."""
    known = model.manifest.get("huggingface") or model.manifest
    return {key: known[key] for key in CARRIED if known.get(key) is not None}


def export_hf(
    checkpoint: Path | str,
    out: Path | str,
    *,
    dtype: torch.dtype | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    shard: int = SHARD,
    files: Callable[[], Mapping[str, bytes]] = dict,
) -> None:
    """Write a Megatron checkpoint of ours as a Hugging Face directory.

    It becomes the first of the families (families/hf.py) that computes it.

    Args:
        checkpoint: a ``step_XXXXXXXX`` directory.
        out: the new directory; appears when it is whole.
        dtype: of the weights; ``None``: as they are stored.
        bos_token_id: the tokenizer's, for generation.
        eos_token_id: likewise.
        shard: bytes a safetensors file.
        files: more small files, such as a tokenizer's.

    Raises:
        UserError: the checkpoint is damaged, no family computes it, or ``out`` cannot be written.
    """
    model = open_megatron(checkpoint, "model")
    tensors = model.tensors
    plan = Plan(
        architecture=model.architecture,
        targets={n: t if dtype is None else t.to(dtype) for n, t in tensors.items()},
        sources={model.label: model.source},
        expected={name: tensor.shape for name, tensor in tensors.items()},
    )
    tokens = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    given = {key: value for key, value in tokens.items() if value is not None}
    write_hf(plan, Path(out), known=carried(model) | given, shard=shard, files=files)


def write_hf(
    plan: Plan,
    out: Path,
    *,
    known: Mapping[str, Any] | None = None,
    family: str | None = None,
    fused: bool = False,
    shard: int = SHARD,
    execution: Execution = ONE_BY_ONE,
    files: Callable[[], Mapping[str, bytes]] = dict,
    check: Callable[[Path], object] = lambda _directory: None,
) -> None:
    """Write any plan over canonical names as a Hugging Face directory: see :func:`export_hf`.

    Args:
        plan: over canonical names, of one dtype.
        out: the new directory.
        known: what :func:`carried` says of the model that it is made of.
        family: ``model_type`` of the family to write; ``None``: that of ``known`` where it computes
            the model, else the first that does.
        fused: experts stacked, as ``transformers`` 5 names them; by default one by one, which every
            loader reads.
        shard: bytes a safetensors file.
        execution: how; no bit of the result depends on it.
        files: more small files, asked for at the end; they may replace ours.
        check: called with the directory before it gets its name.

    Raises:
        UserError: no family computes the model, or ``out`` cannot be written.
    """
    dtypes = {target.dtype for target in plan.targets.values()}
    if len(dtypes) != 1:
        what = f"tensors of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
        raise UserError(str(out), what, "give the dtype of the result")
    dtype = str(dtypes.pop()).removeprefix("torch.")
    tokens = dict(known or {})
    preferred = tokens.pop("model_type", None)
    chosen = wanted(plan.architecture, family) if family else None
    chosen = chosen or family_of(plan.architecture, preferred=preferred)
    # Without a padding token that is said too: a class has one of its own, perhaps beyond the end.
    tokens = {"pad_token_id": None, **tokens}
    config = chosen.write_config(plan.architecture) | {"torch_dtype": dtype, **tokens}
    own = {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, **tokens},
    }
    write_safetensors(
        to_hf(plan, chosen, fused=fused),
        out,
        files=lambda: (
            {name: as_json(value) for name, value in own.items()}
            | without_misread(files(), chosen.model_type)
        ),
        shard=shard,
        execution=execution,
        check=check,
    )
