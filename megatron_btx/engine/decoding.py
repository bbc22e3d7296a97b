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
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, silu

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
        factor = shape.residual_multiplier
        self._layers = [_Layer(layer, factor) for layer in self._model.decoder.layers]
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
        turn = self._cos[self.lengths].unsqueeze(1), self._sin[self.lengths].unsqueeze(1)
        # Up to a multiple: a product of each new size may cost a library machine code of its own.
        longest = -(-(int(self.lengths.max()) + 1) // _MULTIPLE) * _MULTIPLE
        places = torch.arange(min(longest, self._capacity), device=self.lengths.device)
        behind = self.lengths.unsqueeze(1) - places  # [B, L]
        hidden = embedding(tokens, self._embedding) * self._shape.embedding_multiplier
        for layer in self._layers:
            hidden = layer.step(hidden, turn, self.lengths, behind)
        norm = self._model.decoder.final_layernorm
        self.lengths = self.lengths + 1
        scaled = _normalised(hidden, norm) / self._shape.logits_scaling
        return linear(scaled, self._head).float()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        chosen = torch.tensor(rows, device=self.lengths.device)
        self.lengths = self.lengths[chosen]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[chosen], layer.values[chosen]


class _Layer:
    """A transformer layer, its keys and values [B, G, C, D]."""

    def __init__(self, layer: Any, residual_multiplier: float) -> None:
        self._factor = residual_multiplier
        self._layer, self._attention, self._mlp = layer, layer.self_attention, layer.mlp
        self._core = self._attention.core_attention
        skipped = layer.config.no_rope_freq
        self._rotates = not (skipped and skipped[layer.layer_number - 1])
        self._routed = isinstance(getattr(self._mlp, "experts", None), GroupedExperts)
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

    def step(
        self, hidden: Tensor, turn: tuple[Tensor, Tensor], lengths: Tensor, behind: Tensor
    ) -> Tensor:
        """One token of every row, [B, H], at positions ``lengths``.

        Args:
            hidden: what comes in.
            turn: cosines and sines of the positions, [B, 1, D].
            lengths: [B].
            behind: how far each token lies before the row's, [B, L]; negative: it is none of it.
        """
        query, key, value = self._projected(_normalised(hidden, self._layer.input_layernorm), turn)
        rows = torch.arange(len(lengths), device=lengths.device)
        self.keys[rows, :, lengths], self.values[rows, :, lengths] = key, value
        window = self._core.window
        seen = behind >= 0 if window is None else (behind >= 0) & (behind <= window)
        context = self._attend(query, seen)
        attended = linear(context, self._attention.linear_proj.weight)
        hidden = torch.add(hidden, attended, alpha=self._factor)
        x = _normalised(hidden, self._layer.pre_mlp_layernorm)
        made = self._experts(x) if self._routed else _feed_forward(x, self._mlp)
        return torch.add(hidden, made, alpha=self._factor)

    def _projected(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, N, D], keys and values [B, G, D]; the first two turned by their positions."""
        project = self._attention.linear_qkv
        width = self.keys.shape[-1]
        mixed = linear(x, project.weight, project.bias).view(len(x), self.keys.shape[1], -1, width)
        query, key, value = mixed[:, :, :-2].flatten(1, 2), mixed[:, :, -2], mixed[:, :, -1]
        if isinstance(self._attention.q_layernorm, torch.nn.Module) and hasattr(
            self._attention.q_layernorm, "weight"
        ):
            query = _normalised(query, self._attention.q_layernorm)
            key = _normalised(key, self._attention.k_layernorm)
        if self._rotates:
            query, key = _turned(query, *turn), _turned(key, *turn)
        return query, key, value

    def _attend(self, query: Tensor, seen: Tensor) -> Tensor:
        """[B, N D]; scores and their softmax are fp32, as in ops/cpu_attention.py."""
        longest = seen.shape[1]
        keys, values = (kept[:, :, :longest].float() for kept in (self.keys, self.values))
        scale = self._core.softmax_scale or query.shape[-1] ** -0.5
        grouped = query.unflatten(1, (keys.shape[1], -1)).float() * scale  # [B, G, R, D]
        scores = (grouped @ keys.mT).masked_fill_(~seen[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ values).flatten(1).to(query.dtype)

    def _experts(self, x: Tensor) -> Tensor:
        """Each token's experts and the shared one, [B, H]."""
        moe = self._mlp
        gates, chosen = moe.router.routes(moe.router.gating(x), 1)
        fc1, fc2 = moe.experts.linear_fc1.weight, moe.experts.linear_fc2.weight
        out = torch.zeros_like(x)
        for expert in chosen.any(0).nonzero().flatten().tolist():
            rows = chosen[:, expert].nonzero().flatten()
            gate = gates[rows, expert].unsqueeze(1).to(x.dtype)
            made = linear(_activated(linear(x[rows], fc1[expert])), fc2[expert])
            out.index_add_(0, rows, made * gate)
        if moe.shared_experts is not None:
            out = out + moe.shared_experts(x.unsqueeze(0))[0]
        return out


def _feed_forward(x: Tensor, mlp: Any) -> Tensor:
    return linear(_activated(linear(x, mlp.linear_fc1.weight)), mlp.linear_fc2.weight)


def _activated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return silu(gate) * up


def _normalised(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of heads [B, N, D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
