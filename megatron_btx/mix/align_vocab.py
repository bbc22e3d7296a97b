"""Models whose tokenizers are one but for added tokens, put to the same vocabulary.

The ids that a model has no row for, in the embedding or the head, get those of the seed; where the
seed has none either, those of the first source that has. So every model agrees about a token that
it never learned, and an average over copies of one row is that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families import tokenizer_identity
from megatron_btx.families.tokenizer_files import place_of
from megatron_btx.recipe.names import EMBEDDING, HEAD
from megatron_btx.weights.arrange import Cat
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.ops import rows
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import take_all

_FIX = "leave --align-vocab out, or give dense models of one tokenizer and more added tokens"


@dataclass(frozen=True)
class Aligned(Checkpoint):
    """A model some of whose tensors are longer than they are stored."""

    longer: Mapping[str, Expression] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> Mapping[str, Expression]:
        """Its tensors by canonical name."""
        return {**take_all(self.label, self.source), **self.longer}


def align_vocab(models: Sequence[Checkpoint], seed_model: str) -> tuple[list[Aligned], str]:
    """The models with the rows of the largest vocabulary, and whose tokenizer knows all tokens.

    Args:
        models: dense, of one dtype.
        seed_model: label of the seed among them.

    Raises:
        UserErrors: models that have no tokenizer.json, or one that is not that of the most tokens
            without some of its added ones.
    """
    errors = [error for model in models for error in _unfit(model)]
    if len({dtype for model in models for _, dtype in model.source.tensors.values()}) > 1:
        errors.append(UserError("--align-vocab", "the sources have several dtypes", _FIX))
    if errors:
        raise UserErrors(errors)
    places = {model.label: place_of(model.path) for model in models if model.path is not None}
    most = tokenizer_identity.most_tokens(places)
    for label, place in places.items():
        unlike = tokenizer_identity.beyond_added(place, places[most])
        errors += [UserError(label, f"its tokenizer and that of {most}: {w}", _FIX) for w in unlike]
    if errors:
        raise UserErrors(errors)
    givers = sorted(models, key=lambda model: model.label != seed_model)
    return [_aligned(model, givers) for model in models], most


def _unfit(model: Checkpoint) -> list[UserError]:
    if model.architecture.experts:
        return [UserError(model.label, "is an MoE, whose vocabulary stays as it is", _FIX)]
    if model.path is None or not (place_of(model.path) / tokenizer_identity.FAST).is_file():
        what = f"comes without a {tokenizer_identity.FAST}, by which its tokens would be compared"
        return [UserError(model.label, what, _FIX)]
    return []


def _aligned(model: Checkpoint, givers: Sequence[Checkpoint]) -> Aligned:
    """With the rows of the first giver that has more, of the next that has still more, ..."""
    longer: dict[str, Expression] = {}
    for name in (EMBEDDING, HEAD):
        for giver in givers if name in model.tensors else ():
            found, theirs = longer.get(name, model.tensors[name]), giver.tensors.get(name)
            if theirs is not None and theirs.shape[0] > found.shape[0]:
                longer[name] = Cat((found, rows(theirs, found.shape[0], theirs.shape[0])), 0)
    size = max(giver.architecture.vocab_size for giver in givers)
    architecture = replace(model.architecture, vocab_size=size)
    return Aligned(model.label, model.path, architecture, model.source, model.manifest, longer)
