"""Which models can be computed at all, whoever describes them; which layouts divide a model, and
which of those Megatron computes rightly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_btx.recipe import count
from megatron_btx.recipe.schema import Layout, Model, Recipe


class Problem(NamedTuple):
    """One thing that is wrong, by the dotted key of the resolved recipe (``seed.lr``)."""

    key: str
    what: str
    fix: str


def sequence_parallel(layout: Layout, *, moe: bool) -> bool:
    """The layout's ``sequence_parallel`` resolved: on where tensor parallelism meets experts."""
    if layout.sequence_parallel is None:
        return moe and layout.tensor_model_parallel_size > 1
    return layout.sequence_parallel


def problems(
    recipe: Recipe, key: str, layout: Layout, *, experts: Sequence[str], width: int
) -> Iterator[Problem]:
    """Everything wrong with running a model of the recipe under ``layout``: one of ``experts``,
    each ``width`` wide, or without any."""
    moe = bool(experts)
    yield from context(layout, key)
    yield from _divides(recipe, key, layout, width, moe=moe)
    yield from _sequence(recipe, key, layout, moe=moe)
    yield from _experts(experts, key, layout)


def context(layout: Layout, key: str) -> Iterator[Problem]:
    """Context parallelism: no machine has it here. Batches are not cut into the pieces of a
    sequence that Transformer Engine's attention would take each rank's to be: every rank would hold
    the whole, and its tokens attend to copies of their own future."""
    if layout.context_parallel_size > 1:
        yield Problem(
            f"{key}.context_parallel_size",
            f"is {layout.context_parallel_size}: context parallelism is not supported, also "
            "with Transformer Engine: sequences are not divided over its ranks",
            "set it to 1, and use tensor and pipeline parallelism for long sequences",
        )


def _divides(recipe: Recipe, key: str, layout: Layout, ffn: int, *, moe: bool) -> Iterator[Problem]:
    model = recipe.model
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    heads, groups = model.num_attention_heads, count.query_groups(model)
    padded = count.dense_architecture(recipe).padded_vocab_size
    qkv = (heads + 2 * groups) * count.kv_channels(model)
    tp_key = f"{key}.tensor_model_parallel_size"
    lower = "lower it, or change the model"
    if heads % tp:
        yield Problem(tp_key, f"{tp} does not divide model.num_attention_heads ({heads})", lower)
    elif groups % tp and tp % groups:
        # Megatron shares a key/value head between ranks where there are fewer than ranks.
        yield Problem(
            tp_key,
            f"{tp} neither divides model.num_query_groups ({groups}) nor is a multiple of it",
            lower,
        )
    elif qkv % tp:
        yield Problem(
            tp_key, f"{tp} does not divide the width of query, key and value ({qkv})", lower
        )
    ffn_tp, ffn_key = tp, tp_key
    if moe:
        ffn_tp, ffn_key = layout.etp, f"{key}.expert_tensor_parallel_size"
    if ffn % ffn_tp:
        what = "the width of an expert" if moe else "model.ffn_hidden_size"
        yield Problem(ffn_key, f"{ffn_tp} does not divide {what} ({ffn})", lower)
    if padded % tp:
        yield Problem(
            tp_key,
            f"{tp} does not divide the padded vocabulary ({padded})",
            f"make model.make_vocab_size_divisible_by a multiple of {tp}",
        )
    yield from _virtual(model.num_layers, key, layout)
    if model.num_layers % pp:
        yield Problem(
            f"{key}.pipeline_model_parallel_size",
            f"{pp} does not divide model.num_layers ({model.num_layers})",
            "lower it, or change the model",
        )


def _virtual(num_layers: int, key: str, layout: Layout) -> Iterator[Problem]:
    pp, size = layout.pipeline_model_parallel_size, layout.virtual_pipeline_model_parallel_size
    virtual = f"{key}.virtual_pipeline_model_parallel_size"
    if size is None:
        return
    if pp == 1:
        yield Problem(virtual, f"is {size} without a pipeline, whose stages it cuts", "remove it")
    elif num_layers % (pp * size) and not num_layers % pp:
        what = f"{pp} stages of {size} pieces do not divide model.num_layers ({num_layers})"
        yield Problem(virtual, what, "lower it, or change the model")


def batches(layout: Layout, key: str, num_microbatches: int) -> Iterator[Problem]:
    """The interleaved schedule works through micro-batches in groups of PP, and fails on a last one
    that is smaller."""
    pp = layout.pipeline_model_parallel_size
    if layout.chunks > 1 and num_microbatches % pp:
        yield Problem(
            f"{key}.virtual_pipeline_model_parallel_size",
            f"needs a multiple of {pp} micro-batches a step (PP), and there are {num_microbatches}",
            f"make global_batch_size / (micro_batch_size x data_parallel_size) a multiple of {pp}",
        )


def evaluation(layout: Layout, key: str) -> Iterator[Problem]:
    """Nothing waits in an evaluation's pipeline that virtual stages would fill, and a text that is
    asked alone is one micro-batch."""
    if layout.chunks > 1:
        what = "is of training only: any checkpoint is evaluated under any layout"
        yield Problem(f"{key}.virtual_pipeline_model_parallel_size", what, "remove it")


def _sequence(recipe: Recipe, key: str, layout: Layout, *, moe: bool) -> Iterator[Problem]:
    seq = recipe.model.seq_length
    tp = layout.tensor_model_parallel_size
    if layout.sequence_parallel and tp == 1:
        yield Problem(
            f"{key}.sequence_parallel",
            "is on without tensor parallelism, over whose ranks it works",
            "remove it, or raise tensor_model_parallel_size",
        )
    if layout.sequence_parallel is False and moe and tp > 1:
        yield Problem(
            f"{key}.sequence_parallel",
            "is off, but Megatron trains experts under tensor parallelism only with it",
            "remove it",
        )
    pieces = tp if sequence_parallel(layout, moe=moe) else 1
    if seq % pieces:
        yield Problem(
            f"{key}.tensor_model_parallel_size",
            f"model.seq_length ({seq}) is not divisible into {pieces} pieces",
            f"use a seq_length that is a multiple of {pieces}",
        )


def _experts(experts: Sequence[str], key: str, layout: Layout) -> Iterator[Problem]:
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    ep, etp, world = layout.expert_model_parallel_size, layout.etp, layout.world_size
    ep_key = f"{key}.expert_model_parallel_size"
    if not experts:
        if ep > 1:
            yield Problem(
                ep_key, f"{ep}, but this stage trains a dense model", "set it for finetune only"
            )
        return
    if len(experts) % ep:
        yield Problem(
            ep_key,
            f"{ep} does not divide the {len(experts)} experts ({', '.join(experts)})",
            f"choose one of {', '.join(str(n) for n in _divisors(len(experts)))}",
        )
    if world % (etp * ep * pp):
        yield Problem(
            ep_key,
            f"EP x ETP x PP ({ep} x {etp} x {pp}) does not divide the world size ({world} = TP x "
            "PP x CP x DP)",
            "raise data_parallel_size or lower expert_model_parallel_size",
        )
    if ep == 1 and etp != tp:
        yield Problem(
            f"{key}.expert_tensor_parallel_size",
            f"{etp} with TP {tp} and EP 1: Megatron would reduce the experts' gradients over the "
            "wrong ranks, and their replicas would drift apart silently",
            f"use {tp} (leave it out), or expert parallelism (expert_model_parallel_size > 1)",
        )


def model_problems(model: Model) -> Iterator[Problem]:
    """Fields of a model that do not go together, by their names."""
    heads, groups = model.num_attention_heads, count.query_groups(model)
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            "hidden_size",
            f"{model.hidden_size} is not divisible by num_attention_heads ({heads})",
            "change one of them, or give kv_channels",
        )
    elif count.kv_channels(model) % 2:
        yield Problem(
            "kv_channels",
            f"{count.kv_channels(model)} channels a head is odd, and rotary positions need pairs",
            "choose an even width",
        )
    if heads % groups:
        yield Problem(
            "num_query_groups",
            f"{groups} does not divide num_attention_heads ({heads})",
            f"choose one of {', '.join(str(n) for n in _divisors(heads))}",
        )
    yield from _windows(model)
    if model.no_rope_freq is not None and len(model.no_rope_freq) != model.num_layers:
        fix = f"give {model.num_layers} numbers, 1 for a layer without rotary positions, else 0"
        yield Problem("no_rope_freq", f"is {list(model.no_rope_freq)}", fix)


def _windows(model: Model) -> Iterator[Problem]:
    window, freq = model.window_size, model.window_attn_skip_freq
    if window is not None and (len(window) != 2 or window[1] != 0):
        what = f"is {list(window)}; a token may see those before it and itself"
        yield Problem("window_size", what, "write [n, 0]: the n before it and itself")
    if freq is None:
        return
    if window is None:
        yield Problem("window_attn_skip_freq", "there is no window", "give window_size")
    if len(freq) != model.num_layers:
        fix = f"give {model.num_layers} numbers, 1 for a layer with the window and 0 without"
        yield Problem("window_attn_skip_freq", f"is {list(freq)}", fix)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
