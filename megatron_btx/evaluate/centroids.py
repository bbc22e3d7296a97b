"""Routers that know their experts' domains before they are trained: ``router_init: centroids``.

The mixed model reads each expert's own domain, every token of it forced to that expert, and the
mean of what arrives at each feed-forward layer, after the norm, becomes that expert's row of the
router: centred over the experts and scaled, layer by layer, to a chosen spread of the logits. The
paper does not say how its routers are born; this is one way to begin with some knowledge.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from safetensors.torch import save
from torch import Tensor

from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import DTYPES, build_model, unwrap
from megatron_btx.errors import UserError, UserErrors, noted
from megatron_btx.evaluate.heldout import Batch, Listener, evaluate
from megatron_btx.evaluate.loss_on_text import Setting, min_length, packed, whole_sequences
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.evaluate.models import opened, precision_of
from megatron_btx.evaluate.predictor import NO_PROGRESS
from megatron_btx.files import written
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.recipe.schema import Layout, Precision
from megatron_btx.weights.plan import Plan

Texts = Mapping[str, Sequence[Batch]]


@dataclass(frozen=True)
class Centroids:
    """What the passes over the text found."""

    rows: Tensor
    """[layers, experts, H], fp32: the routers."""
    loss: dict[str, float]
    """Nats per token of each expert's domain, all of it forced to that expert."""
    own: list[dict[str, float]]
    """By layer, each domain's share of tokens whose largest logit is their own expert's."""


def measure(
    subject: Subject,
    data: Mapping[str, Sequence[str]],
    setting: Setting,
    *,
    spread: float,
    out: Path,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> dict[str, Any]:
    """Write the centroids of a checkpoint. Every rank calls it.

    Args:
        subject: an MoE.
        data: JSONL files by the name of the expert; whole sequences of them count.
        setting: how to run it.
        spread: standard deviation over the experts of a token's logits (root mean square over all
            tokens), in every layer.
        out: a new safetensors file: ``decoder.layers.{i}.mlp.router.weight/{expert}`` [H], fp32.
        progress: told how much is done.

    Returns:
        ``{"experts", "loss": nats a token by expert, "own": share of tokens that the largest logit
        sends home, by expert (mean over the layers), "spread"}``.

    Raises:
        UserErrors: the model has no experts, one has no text, or too little.
    """
    (checkpoint,) = opened(subject).values()
    names = checkpoint.architecture.experts
    errors = [
        UserError("--data", f"no text for the expert {name}", f"give {name}=FILE")
        for name in names
        if name not in data
    ]
    errors += [
        UserError(
            f"--data {name}", f"{subject.name} has no expert {name}", f"use {', '.join(names)}"
        )
        for name in data
        if name not in names
    ]
    if errors:
        raise UserErrors(errors)
    length = min_length({"model": checkpoint}, setting)
    given = packed(subject, {name: data[name] for name in names}, setting, length)
    texts: dict[str, list[Batch]] = {}
    for name, text in given.items():
        with noted(errors):
            texts[name] = whole_sequences(name, text)
    if errors:
        raise UserErrors(errors)
    precision = setting.precision or precision_of(checkpoint)
    plan = copy(checkpoint, dtype=DTYPES[precision])
    found = centroids(
        plan,
        texts,
        layout=setting.layout,
        precision=precision,
        spread=spread,
        micro_batch_size=setting.micro_batch_size,
        progress=progress,
    )
    if dist.get_rank() == 0:
        with written(out, "wb") as file:
            file.write(as_file(found.rows, names))
    own = {name: sum(layer[name] for layer in found.own) / len(found.own) for name in names}
    return {"experts": list(names), "loss": found.loss, "own": own, "spread": spread}


def centroids(
    moe: Plan,
    texts: Texts,
    *,
    layout: Layout,
    precision: Precision,
    spread: float,
    micro_batch_size: int,
    progress: Callable[[float], None] = NO_PROGRESS,
) -> Centroids:
    """Two passes over each domain, forced to its expert: the means, then the logits that the
    centred means give. Every rank calls it; expert parallelism is not needed and not used.

    Args:
        moe: the mixed model; its routers are not looked at.
        texts: sequences by expert.
        layout: of this job.
        precision: of the computation.
        spread: of the logits, see :func:`measure`.
        micro_batch_size: sequences a rank runs at once.
        progress: told how much is done.
    """
    names = moe.architecture.experts
    layers, hidden = moe.architecture.model.num_layers, moe.architecture.model.hidden_size
    layout = Layout(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        data_parallel_size=layout.data_parallel_size,
        num_threads=layout.num_threads,
    )
    plans = [forced(moe, expert) for expert in range(len(names))]
    module = build_model(plans[0].architecture, layout, precision)
    device = torch.cuda.current_device()
    loss: dict[str, float] = {}

    def through(expert: int, look: Callable[[int, Tensor], None]) -> None:
        """The expert's domain through the model that is that expert alone."""
        initialize(module, plans[expert])
        text = {names[expert]: texts[names[expert]]}
        with _watched(module, look) as listener:
            found = evaluate(module, text, micro_batch_size=micro_batch_size, listener=listener)
        loss.update(found.loss)

    sums = torch.zeros(layers, len(names), hidden + 1, dtype=torch.float64, device=device)
    for expert in range(len(names)):

        def add(layer: int, inputs: Tensor, expert: int = expert) -> None:
            sums[layer, expert, :-1] += inputs.sum(0, dtype=torch.float64)
            sums[layer, expert, -1] += len(inputs)

        through(expert, add)
        progress((expert + 1) / (2 * len(names)))
    dist.all_reduce(sums)  # ranks that hold the same tokens count them in both parts of the mean
    means = sums[..., :-1] / sums[..., -1:]
    centred = means - means.mean(1, keepdim=True)

    seen = torch.zeros(layers, len(names), 3, dtype=torch.float64, device=device)
    for expert in range(len(names)):

        def judge(layer: int, inputs: Tensor, expert: int = expert) -> None:
            logits = inputs.double() @ centred[layer].T
            seen[layer, expert, 0] += logits.var(1, correction=0).sum()
            seen[layer, expert, 1] += (logits.argmax(1) == expert).sum()
            seen[layer, expert, 2] += len(inputs)

        through(expert, judge)
        progress(0.5 + (expert + 1) / (2 * len(names)))
    dist.all_reduce(seen)
    variance = seen[..., 0].sum(1) / seen[..., 2].sum(1)
    rows = centred * (spread / variance.clamp_min(1e-30).sqrt())[:, None, None]
    shares = (seen[..., 1] / seen[..., 2]).tolist()
    del loss["mean"]
    return Centroids(
        rows=rows.float().cpu(),
        loss=loss,
        own=[dict(zip(names, layer, strict=True)) for layer in shares],
    )


def as_file(rows: Tensor, experts: Sequence[str]) -> bytes:
    """The routers' rows [layers, experts, H] as a safetensors file, a tensor each."""
    return save(
        {
            f"decoder.layers.{layer}.mlp.router.weight/{name}": rows[layer, expert].contiguous()
            for layer in range(len(rows))
            for expert, name in enumerate(experts)
        }
    )


@contextlib.contextmanager
def _watched(module: torch.nn.Module, look: Callable[[int, Tensor], None]) -> Iterator[Listener]:
    """Call ``look`` with every layer's number (from 0) and what its FFN is given, normed: [tokens,
    H], of the tokens that count. What it yields must be told of each micro-batch."""
    masks: collections.deque[Tensor] = collections.deque(maxlen=1)
    handles = []
    for layer in unwrap(module).decoder.layers:

        def hook(_mlp: Any, arguments: tuple[Tensor, ...], layer: Any = layer) -> None:
            inputs = _normed(layer, arguments[0].detach())
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
