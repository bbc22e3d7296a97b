"""What models must share before any of their weights can be put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from megatron_btx.errors import UserError
from megatron_btx.families import tokenizer_identity
from megatron_btx.families.tokenizer_files import (
    describe_tokenizer,
    has_chat_template,
    place_of,
)
from megatron_btx.recipe.count import resolved
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.plan import Checkpoint

# Averaging weights is meaningless across these, and a RoPE base that differs goes unnoticed: the
# mix still trains, only worse. The rest of Model says how a model was trained or stored.
_FREE = {
    "seq_length",
    "max_position_embeddings",
    "init_method_std",
    "make_vocab_size_divisible_by",
}


def labels_of(models: Sequence[Checkpoint]) -> list[str]:
    """What the models are called, in their order."""
    return [model.label for model in models]


_ONE_SEED = "mix models that were branched from one seed"
_VOUCH = (
    "mix models of one tokenizer; where the ids that the text uses mean the same in both, say "
    "whose tokenizer the result gets: btx mix --tokenizer NAME"
)
_ALIGN = (
    "one has all tokens of the other and some more: --align-vocab (mix.align_vocab in a recipe) "
    "gives each model a row for every token"
)


def disagreements(models: Sequence[Checkpoint], *, alignable: bool = True) -> list[UserError]:
    """Everything in which the models differ and must not: shape, positions, norms, tokenizer;
    ``alignable``: whether what asks can be given ``--align-vocab``."""
    first, *others = models
    errors = []
    labels = labels_of(models)
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        errors.append(UserError(label, "given twice", "give each model a name of its own"))
    for model in models:
        if model.architecture.experts:
            errors.append(UserError(_where(model), "already an MoE", "give dense models"))
    for other in others:
        errors += differences(first, other, alignable=alignable)
    return errors


def differences(one: Checkpoint, other: Checkpoint, *, alignable: bool = False) -> list[UserError]:
    """Everything in which a second model differs from a first and must not."""
    differing, unlike = _differing(one, other), _unlike_tokenizers(one, other)
    about_tokens = bool(unlike) or any(what == "vocab_size" for what, *_ in differing)
    # Only then: the files of two tokenizers may be megabytes.
    align = alignable and about_tokens and _differ_in_added_tokens(one, other)
    errors = [
        UserError(
            _where(other),
            f"{what} is {theirs}, that of {one.label} is {mine}",
            _ALIGN if align and what == "vocab_size" else _ONE_SEED,
        )
        for what, mine, theirs in differing
    ]
    if unlike:
        what = f"its tokenizer is not that of {one.label}: {'; '.join(unlike)}"
        errors.append(UserError(_where(other), what, _ALIGN if align else _VOUCH))
    return errors


def _differ_in_added_tokens(one: Checkpoint, other: Checkpoint) -> bool:
    if one.path is None or other.path is None:
        return False
    places = place_of(one.path), place_of(other.path)
    return tokenizer_identity.differ_in_added_tokens(*places)


def _differing(one: Checkpoint, other: Checkpoint) -> list[tuple[str, object, object]]:
    sizes = ("vocab_size", one.architecture.vocab_size, other.architecture.vocab_size)
    mine, theirs = (resolved(model.architecture.model) for model in (one, other))
    names = [field.name for field in fields(Model) if field.name not in _FREE]
    pairs = [sizes, *((name, getattr(mine, name), getattr(theirs, name)) for name in names)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def with_tokenizer(models: list[Checkpoint], name: str) -> list[Checkpoint]:
    """The models as if each came with the tokenizer of one of them, on the user's responsibility.

    Raises:
        UserError: there is no such model, or it has no tokenizer.
    """
    if not name:
        return models
    chosen = next((model for model in models if model.label == name), None)
    fix = f"name one of {', '.join(labels_of(models))}, with a tokenizer"
    if chosen is None:
        raise UserError("--tokenizer", f"there is no source {name}", fix)
    tokenizer = chosen.manifest.get("tokenizer")
    if not tokenizer:
        raise UserError("--tokenizer", f"{name} comes without a tokenizer", fix)
    return [replace(one, manifest={**one.manifest, "tokenizer": tokenizer}) for one in models]


def speaker_of(models: Sequence[Checkpoint], name: str) -> Checkpoint | None:
    """The model whose tokenizer and chat template a result gets: the one named, else the first that
    has any; ``None``: none has."""
    if name:
        return next(model for model in models if model.label == name)
    return next((model for model in models if model.manifest.get("tokenizer")), None)


def tokenizer_words(models: Sequence[Checkpoint], name: str) -> list[str]:
    """Whose tokenizer and chat template a result gets, and what it does not get."""
    speaker = speaker_of(models, name)
    if speaker is None or speaker.path is None:
        return ["tokenizer: none of the sources has one, the result has none either"]
    said = [f"tokenizer: that of {speaker.label}"]
    lacking = [model.label for model in models if not model.manifest.get("tokenizer")]
    if lacking:
        said.append(f"{', '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} none")
    have = [m.label for m in models if m.path is not None and has_chat_template(m.path)]
    if speaker.label in have:
        said.append("chat template: its own")
    else:
        elsewhere = f" ({', '.join(have)} has one: --tokenizer {have[0]})" if have else ""
        said.append(f"chat template: none{elsewhere}")
    return ["; ".join(said), *(_vouched(models, speaker) if name else [])]


def _vouched(models: Sequence[Checkpoint], speaker: Checkpoint) -> list[str]:
    """What differs, where the user said that it does not matter."""
    said = []
    for other in models:
        places = [place_of(one.path) for one in (speaker, other) if one.path is not None]
        there = [place for place in places if describe_tokenizer(place) is not None]
        if other.label != speaker.label and len(there) == 2:
            unlike = tokenizer_identity.differences(*there)
            said += [f"tokenizer of {other.label}, left out: {what}" for what in unlike]
    return said


def _unlike_tokenizers(one: Checkpoint, other: Checkpoint) -> list[str]:
    """In what the tokenizers differ, where both models come with one: files of other bytes may be
    one tokenizer."""
    mine, theirs = (model.manifest.get("tokenizer") or {} for model in (one, other))
    hashes = [(each.get("type"), each.get("sha256")) for each in (mine, theirs)]
    if hashes[0] == hashes[1] or None in (hashes[0][1], hashes[1][1]):
        return []
    places = [place_of(model.path) for model in (one, other) if model.path is not None]
    there = [place for place in places if describe_tokenizer(place) is not None]
    if len(there) == 2:
        return tokenizer_identity.differences(*there)
    return [f"sha256 is {hashes[1][1]}, not {hashes[0][1]}"]


def _where(model: Checkpoint) -> str:
    return f"{model.label} ({model.path})" if model.path else model.label
