"""Where documents end within a sequence: Megatron's ``reset_attention_mask`` and ``eod_mask_loss``.

Megatron's datasets would make an S x S mask for every sequence (``create_attention_mask``). Our
attention (engine/ops/attention.py) instead takes, for each token, the position at which its
document begins, which carries the same information. ``reset_position_ids`` has no further effect:
rotary attention (arXiv 2104.09864, equation 16) depends on position differences only, and these are
the same within a document.
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
    """How the ends of documents within a sequence are treated."""

    eos_id: int
    """The end-of-document token."""
    reset_attention_mask: bool = False
    """Each token attends to its own document only."""
    eod_mask_loss: bool = False
    """The token after an end token is not predicted."""

    def marked(self, sample: dict[str, Tensor]) -> dict[str, Tensor]:
        """A sample with these settings applied.

        Args:
            sample: ``tokens`` int64 and ``loss_mask`` float32, both [..., S].

        Returns:
            The sample with ``document_begins`` int64 [..., S], the position at which each token's
            document begins, and a ``loss_mask`` that is 0 where the input is an end token.
        """
        tokens = sample["tokens"]
        if self.reset_attention_mask:
            sample = {**sample, "document_begins": document_begins(tokens, self.eos_id)}
        if self.eod_mask_loss:
            mask = sample["loss_mask"].masked_fill(tokens == self.eos_id, 0.0)
            sample = {**sample, "loss_mask": mask}
        return sample


def boundaries_of(recipe: Recipe, eos_id: int) -> Boundaries:
    """The settings of a recipe.

    Raises:
        UserError: this machine's attention does not support them.
    """
    reset, masked = boundaries(recipe)
    if reset:
        check_attention(platform.detect())
    return Boundaries(eos_id=eos_id, reset_attention_mask=reset, eod_mask_loss=masked)


def check_attention(machine: platform.Platform) -> None:
    """Check that the attention of ``machine`` supports ``reset_attention_mask``.

    Raises:
        UserError: it is Transformer Engine's, which would be causal over the whole sequence.
    """
    if machine.layers == "transformer_engine":
        raise UserError(
            "reset_attention_mask",
            "is not supported with Transformer Engine, which is installed here: its attention is "
            "called with a causal mask and would ignore document boundaries",
            "remove it, or train where Transformer Engine is not installed",
        )


def document_begins(tokens: Tensor, eos_id: int) -> Tensor:
    """The position at which each token's document begins. An end token belongs to the document it
    ends.

    Args:
        tokens: [..., S].
        eos_id: the end-of-document token.

    Returns:
        int64 [..., S], on the device of ``tokens``.
    """
    place = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    behind = torch.where(tokens == eos_id, place, 0).cummax(-1).values
    return torch.cat([torch.zeros_like(behind[..., :1]), behind[..., :-1]], -1)
