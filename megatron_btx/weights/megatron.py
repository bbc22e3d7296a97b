"""How Megatron stores canonical tensors, in both directions.

Reading: stored names (stacked over layers or not, experts stacked or numbered, fc1 whole or as its
halves ``_w`` and ``_v``, the vocabulary padded) become canonical expressions over the stored ones.
Writing: any stored name becomes an expression over the canonical ones. Both are a few small
functions from names to names that know nothing of ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_btx.errors import UserError, UserErrors, shown
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import (
    DENSE_NORM,
    EMBEDDING,
    HEAD,
    MOE_NORM,
    QKV_NORM,
    SHARED,
    canonical_tensors,
)
from megatron_btx.weights import mp_rank, torch_dcp
from megatron_btx.weights.box import Shape
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.manifest import MANIFEST, read_manifest
from megatron_btx.weights.megatron_lm_args import check_own_vocabulary, settings_of
from megatron_btx.weights.mp_rank import MpRankSource, is_mp_rank
from megatron_btx.weights.ops import cat, item, rows, stack
from megatron_btx.weights.plan import Checkpoint, Ignore, mismatches, unmatched
from megatron_btx.weights.random_fill import Fill
from megatron_btx.weights.source import View, read_whole, take_all
from megatron_btx.weights.torch_dcp import is_torch_dcp
from megatron_btx.weights.torch_dist import TorchDistSource

IGNORED = (
    Ignore(r"(chained_\d+\.)?optimizer\..*", "optimiser state: fresh after a mix"),
    Ignore(r"opt_param_scheduler.*", "schedule of a training run"),
    Ignore(r"rng_state.*", "random state of a training run"),
    Ignore(r"common_state(/.*)?", "what is stored once for all ranks: settings, no weights"),
    Ignore(r"rerun_state_machine_state.*", "state of a training run"),
    Ignore(r"(.*\.)?_extra_state(/.*)?", "Transformer Engine's scaling state"),
    Ignore(r".*rotary_pos_emb\.inv_freq", "derived from the RoPE base"),
)
"""Stored things that are not weights. All else must be used."""

# Megatron's local spec and Transformer Engine's put the same two norms under different names; the
# one before the FFN has one canonical name in a dense model and another in an MoE.
_NORMS = {
    "input_layernorm.weight": (QKV_NORM, QKV_NORM),
    QKV_NORM: (QKV_NORM, QKV_NORM),
    MOE_NORM: (DENSE_NORM, MOE_NORM),
    DENSE_NORM: (DENSE_NORM, MOE_NORM),
}
_STACKED_LAYERS = re.compile(r"(decoder\.layers\.)(\D.*)")
_NUMBERED_LAYER = re.compile(r"(decoder\.layers\.\d+\.)(.*)")
_STACKED_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(\D.*)")
_NUMBERED_EXPERT = re.compile(r"(.*\.mlp\.experts\.)experts\.(\d+\..*)")
_HALF = re.compile(r"(.*\.linear_fc1\.weight)_([wv])")

Named = Mapping[str, Expression]


def second_names(architecture: Architecture) -> dict[str, str]:
    """Stored name -> the name under which the other of Megatron's two layer specs looks for it.

    An MoE layer's norm is ``pre_mlp_layernorm`` to the Transformer Engine spec, while the
    ``sharded_state_dict_keys_map`` of the local one sends it where a dense layer's would be, to
    ``mlp.linear_fc1.layer_norm_weight`` (``gpt_layer_specs.py`` of 0.16.1 and of 0.19.2). All other
    names are the same to both.
    """
    stem = "decoder.layers."
    return {f"{stem}{MOE_NORM}": f"{stem}{DENSE_NORM}"} if architecture.experts else {}


def extra_states(architecture: Architecture) -> Iterator[tuple[str, Shape, Shape]]:
    """Key, global shape and offset of every ``_extra_state`` for which one of Megatron's layer
    specs asks a checkpoint (Transformer Engine's scaling state; the local spec's linear layers have
    it too, always ``None``). Without them its loader fails unless it is told to let any mismatch
    pass. The value stored is ``None``: no FP8.
    """
    model, experts = architecture.model, len(architecture.experts)
    attention = ["linear_qkv", "linear_proj", "core_attention"]
    if model.qk_layernorm:
        attention += ["q_layernorm", "k_layernorm"]
    modules = [f"self_attention.{name}" for name in attention]
    linears = ("linear_fc1", "linear_fc2")
    if not experts:
        modules += [f"mlp.{name}" for name in linears]
    else:
        modules += ["pre_mlp_layernorm"]
        if model.moe_shared_expert_intermediate_size is not None:
            modules += [f"{SHARED}.{name}" for name in linears]
    for layer in range(model.num_layers):
        for module in modules:
            yield f"decoder.layers.{module}._extra_state", (model.num_layers,), (layer,)
        for expert in range(experts):
            for name in linears:
                key = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
                yield key, (model.num_layers, experts), (layer, expert)
    yield "decoder.final_layernorm._extra_state", (1,), (0,)


def names_lacking(path: Path, architecture: Architecture) -> list[str]:
    """The names that Megatron's layer specs look for and a ``torch_dist`` directory lacks, as those
    that were written before this project knew of them do.

    Raises:
        UserError: as :class:`TorchDistSource`.
    """
    source = TorchDistSource(path)
    stored = {name.partition("/shard_")[0] for name in [*source.tensors, *source.objects]}
    looked_for = [*second_names(architecture).values()]
    looked_for += [key for key, _, _ in extra_states(architecture)]
    return sorted(set(looked_for) - stored)


def open_megatron(
    path: Path | str, label: str, given: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A directory of Megatron's, ``torch_dist`` or ``mp_rank_*``, seen under canonical names.

    Args:
        path: the directory of one saved step.
        label: what the model is called.
        given: what the model is, where the directory does not say it (:func:`read_manifest`).

    Raises:
        UserErrors: everything by which the directory differs from its manifest, at once.
    """
    path = Path(path)
    if is_mp_rank(path):
        ranks = MpRankSource(path)
        return _open_numbered(path, label, given, ranks, mp_rank.joined(label, ranks))
    source = TorchDistSource(path)
    if is_torch_dcp(path):
        _refuse_stages(path)
        return _open_numbered(path, label, given, source, torch_dcp.joined(label, source))
    architecture, manifest = read_manifest(path, given)
    weights = set(unmatched([*source.tensors, *source.objects], IGNORED))
    stored = {name: take for name, take in take_all(label, source).items() if name in weights}
    named = _canonical(path, stored, architecture, given)
    errors = mismatches(
        named,
        canonical_tensors(architecture),
        str(path),
        "give a checkpoint of the model that its directory describes",
    )
    for name, second in second_names(architecture).items():
        if {name, second} <= stored.keys() and not _equal(source, name, second):
            what = f"{name} and {second} are two norms: the model has one, under either name"
            errors.append(UserError(str(path), what, "remove one, or copy the checkpoint again"))
    for name in sorted(weights & set(source.objects)):
        errors.append(UserError(str(path), f"holds {name}, which is no tensor"))
    if errors:
        raise UserErrors(errors)
    return Checkpoint(label, path, architecture, View(source, named), manifest)


def _refuse_stages(path: Path) -> None:
    """Layers are counted from each stage's first there: those of one hide those of another."""
    stages = (settings_of(path) or {}).get("pipeline_model_parallel_size")
    if stages not in (None, 1):
        what = f"was saved under pipeline parallelism: {stages} stages, each from layer 0 on"
        raise UserError(str(path), what, "save it with --ckpt-format torch_dist")


def _open_numbered(
    path: Path,
    label: str,
    given: Mapping[str, Any] | None,
    source: MpRankSource | TorchDistSource,
    stored: Named,
) -> Checkpoint:
    """A form that keeps modules one by one under their own names."""
    architecture, manifest = read_manifest(path, given)
    stored = {name: stored[name] for name in unmatched(stored, IGNORED)}
    named = _canonical(path, stored, architecture, given)
    view = View(source, named)
    tied = not architecture.model.untie_embeddings_and_output_weights
    if tied and HEAD in named and torch.equal(*(read_whole(view, n) for n in (HEAD, EMBEDDING))):
        del named[HEAD]  # the last pipeline stage's copy
    errors = mismatches(
        named,
        canonical_tensors(architecture),
        str(path),
        "give a checkpoint of the model that its arguments describe",
    )
    if errors:
        raise UserErrors(errors)
    return Checkpoint(label, path, architecture, View(source, named), manifest)


def _equal(source: TorchDistSource, *names: str) -> bool:
    one, other = (read_whole(source, name) for name in names)
    return torch.equal(one, other)


def _canonical(
    path: Path, stored: Named, architecture: Architecture, given: Mapping[str, Any] | None
) -> dict[str, Expression]:
    """:func:`canonical` of what a directory stores."""
    told = (given or {}).get("vocab_size") is not None or (path / MANIFEST).exists()
    if EMBEDDING in stored and not told:
        check_own_vocabulary(path, next(iter(stored[EMBEDDING].shape), None))
    try:
        return canonical(stored, architecture)
    except ValueError as error:
        fix = "copy the checkpoint again, or take an earlier step"
        raise UserError(str(path), f"corrupt: {error}", fix) from error


def canonical(stored: Named, architecture: Architecture) -> dict[str, Expression]:
    """Canonical expressions over stored ones, in the architecture's order.

    Raises:
        ValueError: two that belong together do not fit.
    """
    layers, experts = architecture.model.num_layers, len(architecture.experts)
    named = _join_halves(_number_experts(_number_layers(stored, layers), experts))
    named = {_norm_name(name, moe=bool(architecture.experts)): e for name, e in named.items()}
    for name in {EMBEDDING, HEAD} & named.keys():
        if named[name].shape[:1] > (architecture.vocab_size,):
            named[name] = rows(named[name], 0, architecture.vocab_size)
    order = {name: at for at, name in enumerate(canonical_tensors(architecture))}
    return dict(sorted(named.items(), key=lambda entry: order.get(entry[0], len(order))))


def _number_layers(stored: Named, layers: int) -> dict[str, Expression]:
    """``decoder.layers.X [L, ...]`` -> ``decoder.layers.{i}.X [...]``."""
    named = {}
    for name, expression in stored.items():
        match = _STACKED_LAYERS.fullmatch(name)
        if match is None or not expression.shape:
            named[name] = expression
            continue
        for layer in range(min(expression.shape[0], layers + 1)):  # one more is an error enough
            named[f"{match[1]}{layer}.{match[2]}"] = item(expression, layer)
    return named


def _number_experts(stored: Named, experts: int) -> dict[str, Expression]:
    """``mlp.experts.experts.X [E, ...]`` and ``mlp.experts.experts.{e}.X`` ->
    ``mlp.experts.{e}.X``."""
    named = {}
    for name, expression in stored.items():
        stacked, numbered = _STACKED_EXPERTS.fullmatch(name), _NUMBERED_EXPERT.fullmatch(name)
        if numbered:
            named[f"{numbered[1]}{numbered[2]}"] = expression
        elif stacked and expression.shape:
            for expert in range(min(expression.shape[0], experts + 1)):
                named[f"{stacked[1]}{expert}.{stacked[2]}"] = item(expression, expert)
        else:
            named[name] = expression
    return named


def _join_halves(stored: Named) -> dict[str, Expression]:
    """``linear_fc1.weight_w`` (gate) and ``_v`` (up) -> ``linear_fc1.weight``.

    Raises:
        ValueError: the two have different widths.
    """
    named = {}
    for name, expression in stored.items():
        match = _HALF.fullmatch(name)
        if match is None or f"{match[1]}_v" not in stored or f"{match[1]}_w" not in stored:
            named[name] = expression
        elif match[2] == "w":
            try:
                named[match[1]] = cat((expression, stored[f"{match[1]}_v"]))
            except ValueError as error:
                what = f"tensors {shown(name)} and {shown(match[1])}_v: {error}"
                raise ValueError(what) from error
    return named


def _norm_name(name: str, *, moe: bool) -> str:
    match = _NUMBERED_LAYER.fullmatch(name)
    if match is None or match[2] not in _NORMS:
        return name
    return f"{match[1]}{_NORMS[match[2]][moe]}"


def stored(name: str, shape: Shape, named: Named) -> Expression:
    """What Megatron stores as ``name``, over canonical tensors: the inverse of :func:`canonical`.

    Args:
        name: layers and experts stacked or numbered, fc1 whole or ``_w`` / ``_v``.
        shape: its global shape; the rows of vocabulary padding are zeros.
        named: the canonical tensors of the model.

    Raises:
        KeyError: a canonical tensor that it needs and the model lacks.
    """
    if name in named:
        found = named[name]
        if name in (EMBEDDING, HEAD) and shape[0] > found.shape[0]:
            padding = Fill(0.0, (shape[0] - found.shape[0], *found.shape[1:]), found.dtype)
            found = cat((found, padding))
        return found
    if layers := _STACKED_LAYERS.fullmatch(name):
        return stack(
            [stored(f"{layers[1]}{i}.{layers[2]}", shape[1:], named) for i in range(shape[0])]
        )
    if half := _HALF.fullmatch(name):
        ffn = shape[0]
        fc1 = stored(half[1], (2 * ffn, *shape[1:]), named)
        return rows(fc1, 0, ffn) if half[2] == "w" else rows(fc1, ffn, 2 * ffn)
    if numbered := _NUMBERED_EXPERT.fullmatch(name):
        return named[f"{numbered[1]}{numbered[2]}"]
    if experts := _STACKED_EXPERTS.fullmatch(name):
        return stack([named[f"{experts[1]}{e}.{experts[2]}"] for e in range(shape[0])])
    for moe in (True, False):
        alias = _norm_name(name, moe=moe)
        if alias in named:
            return named[alias]
    raise KeyError(name)
