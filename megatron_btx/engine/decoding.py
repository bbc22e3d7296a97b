"""Texts that grow by a token at a time: keys and values of what has been read are kept, so that a
token costs one token's work.

A text is read by Megatron's model, whose attention is asked for keys and values on the way. The
tokens that follow go through the same weights by a few products each (``_Layer``): Megatron's
modules, made for whole sequences, take ten times the time of such a step at the size of the demo,
and its inference context wants all rows of a batch at one length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import (
    embedding,
    linear,
    rms_norm,
    scaled_dot_product_attention,
    silu,
)

from megatron_btx.engine import cpu_tuning
from megatron_btx.engine.moe.experts import GroupedExperts
from megatron_btx.engine.moe.router import dropless
from megatron_btx.recipe.schema import Model

_MULTIPLE = 64

# Shapes: B rows, S tokens read at once, C the most tokens of a row, L those of the longest row so
# far, H hidden, N query heads, G key/value heads, R = N / G, D width of a head, V vocabulary.


class KeyValueCache:
    """What a model has read of B rows.

    Args:
        module: whole on this rank, of our own layers (engine/spec.py), in ``eval`` mode; its
            routing draws no noise.
        shape: what the model is.
        capacity: C.
    """

    def __init__(self, module: torch.nn.Module, shape: Model, capacity: int) -> None:
        self._module, self._shape, self._capacity = module, shape, capacity
        (self._model,) = (part for part in module.modules() if isinstance(part, GPTModel))
        angles = self._model.rotary_pos_emb.forward(capacity)[:, 0, 0]  # [C, D]
        self._embedding = self._model.embedding.word_embeddings.weight
        tied = self._model.share_embeddings_and_output_weights
        self._head = self._embedding if tied else self._model.output_layer.weight
        self._cos, self._sin = (part.to(self._head.dtype) for part in (angles.cos(), angles.sin()))
        half = self._sin.shape[1] // 2
        self._sin[:, :half].neg_()  # (a, b) -> (a cos - b sin, b cos + a sin) of halves a, b
        factor = shape.residual_multiplier
        self._layers = [_Layer(layer, factor) for layer in self._model.decoder.layers]
        self._norm = _Norm(self._model.decoder.final_layernorm)
        self.lengths = torch.zeros(0, dtype=torch.int64)
        """Tokens of each row, [B]."""

    @torch.no_grad()
    def read(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Read rows from their beginning.

        Args:
            tokens: [B, S]; what stands after a row's length counts for nothing.
            lengths: [B], at least 1.

        Returns:
            Logits [B, S, V], those that pad the vocabulary included.
        """
        self.lengths = lengths.to(tokens.device)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        with self._listening(), dropless(self._module):
            logits: Tensor = self._module(tokens, positions, attention_mask=None)
        return logits

    @contextmanager
    def _listening(self) -> Iterator[None]:
        hooks = [layer.listen(self._capacity) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token more of every row, [B]; logits [B, V]."""
        with cpu_tuning.for_few_rows(len(tokens), tokens.device):
            return self._step(tokens)

    def _step(self, tokens: Tensor) -> Tensor:
        lengths = self.lengths.tolist()
        # Up to a multiple: a product of each new size may cost a library machine code of its own.
        longest = min(-(-(max(lengths) + 1) // _MULTIPLE) * _MULTIPLE, self._capacity)
        cos, sin = (part[self.lengths, None, None] for part in (self._cos, self._sin))
        same = lengths[0] if len({*lengths}) == 1 else None
        places = torch.arange(longest, device=self.lengths.device)
        behind = self.lengths.unsqueeze(1) - places
        where = _Where(self.lengths, same, cos, sin, behind, {})
        hidden = embedding(tokens, self._embedding)
        if self._shape.embedding_multiplier != 1:
            hidden = hidden * self._shape.embedding_multiplier
        for layer in self._layers:
            hidden = layer.step(hidden, where)
        self.lengths = self.lengths + 1
        hidden = self._norm(hidden)
        if self._shape.logits_scaling != 1:
            hidden = hidden / self._shape.logits_scaling
        return linear(hidden, self._head).float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        chosen = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[chosen]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]


@dataclass(frozen=True)
class _Where:
    """Where the new tokens of a step stand.

    Args:
        lengths: their positions, [B].
        same: the position, where all have the same.
        cos: of the positions' angles, [B, 1, 1, D].
        sin: likewise, negative in the first half.
        behind: how far each token lies before the row's new one, [B, L]; negative: it is no token.
        masks: made so far, by window.
    """

    lengths: Tensor
    same: int | None
    cos: Tensor
    sin: Tensor
    behind: Tensor
    masks: dict[int | None, Tensor]

    def seen(self, window: int | None) -> Tensor:
        """Which tokens a row's new one attends to, bool [B, 1, 1, L]."""
        if window not in self.masks:
            found = self.behind >= 0
            if window is not None:
                found &= self.behind <= window
            self.masks[window] = found[:, None, None]
        return self.masks[window]

    def turned(self, heads: Tensor) -> Tensor:
        """Heads [B, G, N, D], turned by the positions' angles. Each product is rounded alone, as
        Megatron's: in bf16 another rounding now and then chooses another expert."""
        return heads * self.cos + heads.roll(heads.shape[-1] // 2, -1) * self.sin

    def store(self, kept: Tensor, new: Tensor) -> None:
        """Keep ``new`` [B, G, D] at the positions in ``kept`` [B, G, C, D]."""
        if self.same is not None:
            kept[:, :, self.same] = new
        else:
            kept[torch.arange(len(new), device=new.device), :, self.lengths] = new


class _Norm:
    """RMSNorm with a module's gain. A module's own attributes take as long as such an operation."""

    def __init__(self, module: Any) -> None:
        self._weight, self._eps = module.weight, module.eps
        self._shape = list(module.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self._shape, self._weight, self._eps)


class _Layer:
    """A transformer layer, its keys and values [B, G, C, D]."""

    def __init__(self, layer: Any, residual_multiplier: float) -> None:
        self._factor = residual_multiplier
        attention, self._mlp = layer.self_attention, layer.mlp
        self._qkv, self._bias = attention.linear_qkv.weight, attention.linear_qkv.bias
        self._proj, self._core = attention.linear_proj.weight, attention.core_attention
        self._window, self._scale = self._core.window, self._core.softmax_scale
        self._norm, self._mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        heads = (attention.q_layernorm, attention.k_layernorm)
        self._head_norms = [_Norm(norm) for norm in heads if hasattr(norm, "weight")]
        skipped = layer.config.no_rope_freq
        self._rotates = not (skipped and skipped[layer.layer_number - 1])
        experts: Any = getattr(self._mlp, "experts", None)
        self._routed = isinstance(experts, GroupedExperts)
        products = experts if self._routed else self._mlp
        self._fc1, self._fc2 = products.linear_fc1.weight, products.linear_fc2.weight
        if self._routed:
            self._router, self._shared = self._mlp.router, self._mlp.shared_experts
        self.keys = self.values = torch.zeros(0)

    def listen(self, capacity: int) -> Any:
        """Keep keys and values of the next forward pass; what comes back ends that."""
        return self._core.register_forward_pre_hook(partial(self._heard, capacity))

    def _heard(self, capacity: int, _core: object, inputs: tuple[Tensor, ...]) -> None:
        kept = []
        for new in inputs[1:3]:  # [S, B, G, D]
            seq, batch, heads, width = new.shape
            kept.append(new.new_zeros(batch, heads, capacity, width))
            kept[-1][:, :, :seq] = new.permute(1, 2, 0, 3)
        self.keys, self.values = kept

    def step(self, hidden: Tensor, where: _Where) -> Tensor:
        """One token of every row, [B, H]."""
        attended = linear(self._attend(self._norm(hidden), where), self._proj)
        hidden = torch.add(hidden, attended, alpha=self._factor)
        x = self._mlp_norm(hidden)
        made = self._experts(x) if self._routed else _feed_forward(x, self._fc1, self._fc2)
        return torch.add(hidden, made, alpha=self._factor)

    def _attend(self, x: Tensor, where: _Where) -> Tensor:
        """Its new keys and values are kept; what it finds, [B, N D]. Scores and their softmax are
        fp32, as in ops/cpu_attention.py."""
        groups, width = self.keys.shape[1], self.keys.shape[3]
        mixed = linear(x, self._qkv, self._bias).view(len(x), groups, -1, width)
        heads, value = mixed[:, :, :-1], mixed[:, :, -1]  # the last of the heads is the key
        if self._head_norms:
            queries, keys = self._head_norms
            heads = torch.cat((queries(heads[:, :, :-1]), keys(heads[:, :, -1:])), 2)
        if self._rotates:
            heads = where.turned(heads)
        where.store(self.keys, heads[:, :, -1])
        where.store(self.values, value)
        seen = where.seen(self._window)
        longest = seen.shape[-1]
        found = scaled_dot_product_attention(
            heads[:, :, :-1].float(),  # [B, G, R, D]
            self.keys[:, :, :longest].float(),
            self.values[:, :, :longest].float(),
            attn_mask=seen,
            scale=self._scale,
        )
        return found.flatten(1).to(x.dtype)

    def _experts(self, x: Tensor) -> Tensor:
        """Each token's experts and the shared one, [B, H]."""
        gates, chosen = self._router.routes(self._router.gating(x), 1)
        out = self._alone(x, gates, chosen) if len(x) == 1 else self._together(x, gates, chosen)
        return out if self._shared is None else out + self._shared(x.unsqueeze(0))[0]

    def _alone(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        """One token: nothing is gathered or scattered."""
        (row,), (taken,) = gates.tolist(), chosen.tolist()
        out = torch.zeros_like(x)
        for expert, gate in enumerate(row):
            if taken[expert]:
                made = _feed_forward(x, self._fc1[expert], self._fc2[expert])
                out.add_(made, alpha=gate)
        return out

    def _together(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.any(0).nonzero().flatten().tolist():
            rows = chosen[:, expert].nonzero().flatten()
            gate = gates[rows, expert].unsqueeze(1).to(x.dtype)
            made = _feed_forward(x[rows], self._fc1[expert], self._fc2[expert])
            out.index_add_(0, rows, made * gate)
        return out


def _feed_forward(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = linear(x, fc1).chunk(2, -1)
    return linear(silu(gate) * up, fc2)
