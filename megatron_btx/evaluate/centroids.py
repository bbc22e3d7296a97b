"""Routers that know their experts' domains before they are trained: ``router_init: centroids`` and
``ridge``.

The mixed model reads each expert's own domain, every token of it forced to that expert. What
arrives at each feed-forward layer, after the norm, decides that expert's row of the router: its
mean, centred over the experts and scaled, layer by layer, to a chosen spread of the logits; or the
ridge regression of the domain on it. The paper does not say how its routers are initialised.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import save
from torch import Tensor

from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model, unwrap
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.evaluate.heldout_loss import Batch, Listener, evaluate
from megatron_btx.evaluate.loss_on_text import EvalSetting, packed, whole_sequences
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.models import opened, precision_of
from megatron_btx.evaluate.predictor import NO_PROGRESS
from megatron_btx.evaluate.router_init_rows import (
    REGULARIZATION,
    Sums,
    centroid_rows,
    joined,
    no_sums,
    read_sums,
    ridge_rows,
    version_of,
    write_results,
)
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.recipe.schema import Layout, Precision
from megatron_btx.weights.plan import Plan

SPREAD = 1.0
"""Of the logits, by default, of ``centroids``."""

Texts = Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Routers:
    """What the passes over the text found."""

    rows: Tensor
    """[layers, experts, H], fp32."""
    sums: Sums
    """Over the text that was read, and those given."""
    loss: dict[str, float]
    """Nats per token of each domain that was read, all of it forced to its expert."""
    own: list[dict[str, float]]
    """By layer, each domain's share of tokens whose largest logit is their own expert's."""


def measure(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    setting: EvalSetting,
    *,
    out: Path,
    kind: Literal["centroids", "ridge"] = "centroids",
    spread: float | None = None,
    regularization: float = REGULARIZATION,
    statistics: Path | None = None,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> dict[str, Any]:
    """Write the routers of a checkpoint. Every rank calls it.

    Args:
        subject: an MoE.
        data: JSONL files by the name of the expert; whole sequences of them count.
        setting: how to run it.
        out: a new safetensors file: ``decoder.layers.{i}.mlp.router.weight/{expert}`` [H], fp32.
        kind: the rule, ``centroid_rows`` or ``ridge_rows``.
        spread: standard deviation over the experts of a token's logits (root mean square over all
            tokens), in every layer; ``None``: 1 for ``centroids``, ``ridge`` as it is solved.
        regularization: of ``ridge``.
        statistics: of ``ridge``, a file of sums: domains that it holds need no text, those that are
            read now are added to it.
        progress: told how much is done.

    Returns:
        ``{"experts", "kind", "spread", "loss": nats a token by domain, "own": share of tokens that
        whose largest logit is their own expert's, by domain (mean over the layers)}``.

    Raises:
        UserErrors: the model has no experts, one has no text, or too little; the statistics are of
            another model, or were changed meanwhile.
    """
    (checkpoint,) = opened(subject, setting.tokenizer).values()
    names, model = checkpoint.architecture.experts, checkpoint.architecture.model
    version = version_of(statistics)
    before = read_sums(statistics, model.num_layers, model.hidden_size) if statistics else None
    errors = list(_misnamed(subject.name, names, data, str(statistics), before))
    if errors:
        raise UserErrors(errors)
    wanted = {name: data[name] for name in names if name in data}
    given = packed(subject, wanted, setting, {"model": checkpoint})
    texts: dict[str, list[Batch]] = {}
    for name, text in given.items():
        with collect_errors(errors):
            texts[name] = whole_sequences(name, text)
    if errors:
        raise UserErrors(errors)
    precision = setting.precision or precision_of(checkpoint)
    spread = SPREAD if kind == "centroids" and spread is None else spread
    found = routers(
        copy(checkpoint, dtype=DTYPES[precision]),
        texts,
        layout=setting.layout,
        precision=precision,
        rule=centroid_rows
        if kind == "centroids"
        else functools.partial(ridge_rows, regularization=regularization),
        gram=kind == "ridge",
        before=before,
        spread=spread,
        micro_batch_size=setting.micro_batch_size,
        progress=progress,
    )
    if dist.get_rank() == 0:
        rows = as_file(found.rows, names, kind)
        write_results(out, rows, statistics, found.sums, version)
    own = {name: sum(layer[name] for layer in found.own) / len(found.own) for name in texts}
    return {
        "experts": list(names),
        "kind": kind,
        "spread": spread,
        "loss": found.loss,
        "own": own,
    }


def _misnamed(
    model: str,
    names: Sequence[str],
    data: Mapping[str, Sequence[str]],
    statistics: str,
    before: Sums | None,
) -> Iterator[UserError]:
    """Experts without text, text without experts, and sums that do not go with the two."""
    known = before.domains if before else ()
    for name in names:
        if name not in data and name not in known:
            yield UserError("--data", f"no text for the expert {name}", f"give {name}=FILE")
    fix = f"use {', '.join(names)}"
    for name in data:
        if name not in names:
            yield UserError(f"--data {name}", f"{model} has no expert {name}", fix)
        elif name in known:
            yield UserError(statistics, f"holds the domain {name} already", "leave its text out")
    for name in known:
        if name not in names:
            yield UserError(statistics, f"holds {name}, which is no expert of {model}", fix)


def routers(
    moe: Plan,
    texts: Texts,
    *,
    layout: Layout,
    precision: Precision,
    rule: Callable[[Sums], Tensor],
    gram: bool,
    spread: float | None,
    micro_batch_size: int,
    before: Sums | None = None,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> Routers:
    """Two passes over each domain, forced to its expert: the sums, then the logits that the rows
    made of them give. Every rank calls it; expert parallelism is not needed and not used.

    Args:
        moe: the mixed model; its routers are not looked at.
        texts: sequences by expert.
        layout: of this job.
        precision: of the computation.
        rule: sums -> rows [layers, experts, H], fp64.
        gram: whether the rule needs X^T X.
        spread: of the logits, see :func:`measure`.
        micro_batch_size: sequences a rank runs at once.
        before: sums over the domains that are not in ``texts``.
        progress: told how much is done.

    Raises:
        UserError: the model computes NaN or infinity.
    """
    names = moe.architecture.experts
    layers, hidden = moe.architecture.model.num_layers, moe.architecture.model.hidden_size
    layout = Layout(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        num_threads=layout.num_threads,
    )
    plans = {name: forced(moe, names.index(name)) for name in texts}
    module = build_model(forced(moe, 0).architecture, layout, precision)
    device = torch.cuda.current_device()
    loss: dict[str, float] = {}

    def through(name: str, look: Callable[[int, Tensor], None]) -> None:
        """The expert's domain through the model that is that expert alone."""
        initialize(module, plans[name])
        with _watched(module, look) as listener:
            found = evaluate(
                module, {name: texts[name]}, micro_batch_size=micro_batch_size, listener=listener
            )
        loss.update(found.loss)

    sums = no_sums(tuple(texts), layers, hidden, gram=gram, device=device)
    for index, name in enumerate(texts):

        def add(layer: int, inputs: Tensor, index: int = index) -> None:
            sums.add(layer, index, inputs)

        through(name, add)
        progress((index + 1) / (2 * len(texts)))
    for tensor in sums.tensors:
        dist.all_reduce(tensor)
    every = joined(sums, before, names)
    if not all(tensor.isfinite().all() for tensor in every.tensors):  # the same on every rank
        what = f"computes NaN or infinity on the text of {', '.join(texts)}"
        raise UserError("the mixed model", what, "look at its weights, or compute in fp32")
    rows = rule(every)

    seen = torch.zeros(layers, len(texts), 3, dtype=torch.float64, device=device)
    for index, name in enumerate(texts):

        def judge(layer: int, inputs: Tensor, index: int = index, name: str = name) -> None:
            logits = inputs.double() @ rows[layer].T
            seen[layer, index, 0] += logits.var(1, correction=0).sum()
            seen[layer, index, 1] += (logits.argmax(1) == names.index(name)).sum()
            seen[layer, index, 2] += len(inputs)

        through(name, judge)
        progress(0.5 + (index + 1) / (2 * len(texts)))
    dist.all_reduce(seen)
    if spread is not None:
        variance = seen[..., 0].sum(1) / seen[..., 2].sum(1)
        rows = rows * (spread / variance.clamp_min(1e-30).sqrt())[:, None, None]
    shares = (seen[..., 1] / seen[..., 2]).tolist()
    loss.pop("mean", None)
    return Routers(
        rows=rows.float().cpu(),
        sums=every,
        loss=loss,
        own=[dict(zip(texts, layer, strict=True)) for layer in shares],
    )


def as_file(rows: Tensor, experts: Sequence[str], kind: str) -> bytes:
    """The routers' rows [layers, experts, H] as a safetensors file, a tensor each."""
    named = {
        f"decoder.layers.{layer}.mlp.router.weight/{name}": rows[layer, expert].contiguous()
        for layer in range(len(rows))
        for expert, name in enumerate(experts)
    }
    return save(named, metadata={"router_init": kind})


@contextlib.contextmanager
def _watched(module: torch.nn.Module, look: Callable[[int, Tensor], None]) -> Iterator[Listener]:
    """Call ``look`` with every layer's number (from 0) and what its FFN is given, normed: [tokens,
    H], of the tokens that count. What it yields must be told of each micro-batch. Tensor-parallel
    ranks that hold the same tokens count them once."""
    masks: collections.deque[Tensor] = collections.deque(maxlen=1)
    handles = []
    for layer in unwrap(module).decoder.layers:

        def hook(_mlp: Any, arguments: tuple[Tensor, ...], layer: Any = layer) -> None:
            inputs = _normed(layer, arguments[0].detach())
            whole = len(inputs) == masks[-1].shape[1]
            if whole and parallel_state.get_tensor_model_parallel_rank() > 0:
                return
            look(layer.layer_number - 1, inputs[_local(masks[-1], len(inputs))])

        handles.append(layer.mlp.register_forward_pre_hook(hook))
    try:
        yield lambda batch: masks.append(batch["loss_mask"].bool())
    finally:
        for handle in handles:
            handle.remove()


def _local(mask: Tensor, length: int) -> Tensor:
    """A mask [b, S] of a micro-batch as one [s, b] of the positions that this rank's FFN is given:
    with sequence parallelism a slice of them."""
    first = 0
    if length < mask.shape[1]:
        first = length * parallel_state.get_tensor_model_parallel_rank()
    return mask.T[first : first + length]


def _normed(layer: Any, inputs: Tensor) -> Tensor:
    """Transformer Engine norms inside fc1, so that what the FFN is given is not normed yet."""
    if not isinstance(layer.pre_mlp_layernorm, IdentityOp):
        return inputs
    wide = inputs.float()
    scale = (wide.square().mean(-1, keepdim=True) + layer.config.layernorm_epsilon).rsqrt()
    return wide * scale * layer.mlp.linear_fc1.layer_norm_weight.float()
