"""Where documents end within a sequence: Megatron's ``reset_attention_mask`` and ``eod_mask_loss``.

Megatron's datasets would make a mask of S x S for every sequence (``create_attention_mask``). Which
position a token's document begins at says the same, and is what our attention takes
(engine/ops/attention.py). ``reset_position_ids`` changes nothing beside it: rotary positions
(arXiv 2104.09864, equation 16) enter attention by their differences alone, and within a document
these are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_btx.engine import platform
from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import boundaries


@dataclass(frozen=True, kw_only=True, slots=True)
class Boundaries:
    """What happens at the ends of documents."""

    eos_id: int
    """The token that ends one."""
    reset_attention_mask: bool = False
    """A token sees its own document only."""
    eod_mask_loss: bool = False
    """What follows an end token is not predicted."""

    def marked(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """``sample`` (``tokens`` and ``loss_mask`` [..., S]) with what a model is told: where each
        token's document begins, ``document_begins`` int64 [..., S], and a ``loss_mask`` that is 0
        where the input is an end token."""
        tokens = sample["tokens"]
        if self.reset_attention_mask:
            sample = {**sample, "document_begins": document_begins(tokens, self.eos_id)}
        if self.eod_mask_loss:
            mask = sample["loss_mask"].masked_fill(tokens == self.eos_id, 0.0)
            sample = {**sample, "loss_mask": mask}
        return sample


def boundaries_of(recipe: Recipe, eos_id: int) -> Boundaries:
    """A recipe's.

    Raises:
        UserError: this machine's attention cannot.
    """
    reset, masked = boundaries(recipe)
    if reset:
        check_attention(platform.detect())
    return Boundaries(eos_id=eos_id, reset_attention_mask=reset, eod_mask_loss=masked)


def check_attention(machine: platform.Platform) -> None:
    """That the attention of ``machine`` can be told where documents begin.

    Raises:
        UserError: it is Transformer Engine's, which would be causal over the whole sequence.
    """
    if machine.layers == "transformer_engine":
        raise UserError(
            "reset_attention_mask",
            "is not followed by Transformer Engine's attention, which this machine has: it is told "
            "that the mask is causal, and would look at no other",
            "remove it, or train where Transformer Engine is not installed",
        )


def document_begins(tokens: Tensor, eos_id: int) -> Tensor:
    """The position at which each token's document begins; an end token is its document's last.

    Args:
        tokens: [..., S].
        eos_id: ends a document.

    Returns:
        int64 [..., S], on the device of ``tokens``.
    """
    place = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    behind = torch.where(tokens == eos_id, place, 0).cummax(-1).values
    return torch.cat([torch.zeros_like(behind[..., :1]), behind[..., :-1]], -1)
