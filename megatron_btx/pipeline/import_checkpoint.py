"""Stages whose model is taken as it is: ``seed: {from: DIR}``, and experts of zero tokens.

The checkpoint is checked and linked where the stage would have left its own, so that the
stages after it need not know. A Hugging Face directory, or that of another trainer on
Megatron-Core, is converted to that place.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_btx.errors import UserError, UserErrors, collect_errors, errors_of
from megatron_btx.files import named_path, unfinished
from megatron_btx.pipeline.graph import Stage
from megatron_btx.provenance import code_revision
from megatron_btx.recipe import count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Recipe
from megatron_btx.recipe.stages import architecture, imported, recipe_key, taken
from megatron_btx.recipe.stages import directory as stage_directory
from megatron_btx.recipe.systems import kinds
from megatron_btx.weights.find_checkpoint import find_checkpoint, is_hugging_face
from megatron_btx.weights.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from megatron_btx.mix.align_vocab import Aligned

_FREE = frozenset({"seq_length", "max_position_embeddings", "init_method_std"})
"""Fields of ``Model`` in which a checkpoint may differ: they shape no weight and no result."""


def check(recipe: Recipe, name: str) -> None:
    """See that the checkpoint for stage ``name`` is there and is of the recipe's model.

    Raises:
        UserError: it is missing, incomplete, a mixture of experts or of another shape.
    """
    source = imported(recipe, name)
    assert source is not None
    if source != "seed":
        _read(recipe, name, Path(source))


def check_all(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """``check`` for every checkpoint that these stages take, and that they go together: a model's
    rows are its tokenizer's pieces, so all of a mix have one tokenizer, which is the recipe's. And
    where they are to leave as one model for Hugging Face, that there is one which computes it.

    Raises:
        UserErrors: all that is wrong.
    """
    errors: list[UserError] = []
    tokenizers: dict[str, Path] = {}
    for stage in stages:
        source = imported(recipe, stage.name) if stage.kind == "import" else None
        if source in (None, "seed"):
            continue
        where = f"{recipe_key(stage.name)}.from"
        try:
            directory, manifest = _read(recipe, stage.name, Path(str(source)))
        except UserError as error:
            errors.append(error)
            continue
        tokenizers[where] = directory
        if recipe.tokenizer.path is not None:
            with collect_errors(errors):
                _check_given(directory, Path(recipe.tokenizer.path), where)
            continue
        lacking = stage.name == "seed" and manifest.get("tokenizer", "") is None
        if lacking:
            errors.append(
                UserError(
                    where,
                    f"{directory} comes without its tokenizer",
                    "give the tokenizer it was trained with as tokenizer.path",
                )
            )
        elif recipe.seed.from_ is None:
            errors.append(
                UserError(
                    where,
                    f"{directory} has a tokenizer of its own, and the recipe would train another",
                    "give the seed it was branched from as `seed: {from: ...}`, or its tokenizer "
                    f"as `tokenizer: {_tokenizer(directory, manifest)}`",
                )
            )
        elif recipe.mix.align_vocab:
            continue  # asked below, of all of them
        elif unlike := _other_tokenizer(first := next(iter(tokenizers.values())), directory):
            what = f"{directory} has another tokenizer than {next(iter(tokenizers))}: {unlike}"
            fix = "take models that were trained with one tokenizer"
            errors.append(UserError(where, what, _align(first, directory) or fix))
    if recipe.mix.align_vocab and tokenizers and not errors:
        aligned(recipe)
    if tokenizers and not errors and any(stage.kind == "export" for stage in stages):
        check_export(recipe)
    if errors:
        raise UserErrors(errors)


def check_export(recipe: Recipe) -> None:
    """That what a recipe's run will export is computed by a Hugging Face family: known before
    anything is trained.

    Raises:
        UserError: there is none.
    """
    from megatron_btx.families.hf import family_of

    if "export" in kinds(recipe) and recipe.export.format == "hf":
        try:
            family_of(architecture(recipe, "finetune"))
        except UserError as error:
            fix = "set `export: {format: none}`: the mixture stays in Megatron's format"
            raise UserError("export.format", error.what, fix) from None


def _check_given(checkpoint: Path, tokenizer: Path, where: str) -> None:
    """That a checkpoint was trained with the tokenizer that is given, if it says with which."""
    from megatron_btx.data.run_tokenizer import DROP, unlike_given

    with errors_of("tokenizer.path"):
        unlike = unlike_given(checkpoint, tokenizer)
    if unlike:
        what = f"{checkpoint} was trained with another tokenizer than tokenizer.path: {unlike}"
        fix = DROP if where == "seed.from" else "take models that were trained with one tokenizer"
        raise UserError(where, what, fix)


def _align(one: Path, other: Path) -> str:
    """What to do where one tokenizer has all tokens of the other and some more."""
    from megatron_btx.families.tokenizer_files import place_of
    from megatron_btx.families.tokenizer_identity import differ_in_added_tokens

    if not differ_in_added_tokens(place_of(one), place_of(other)):
        return ""
    return (
        "one has all tokens of the other and some more: `mix: {align_vocab: true}` (btx init "
        "--align-vocab) gives each model a row for every token"
    )


def aligned(recipe: Recipe) -> tuple[dict[str, Aligned], str]:
    """The models that are taken, by name, with the rows of the largest vocabulary, and which of
    them has the tokenizer of the most tokens (``mix.align_vocab``).

    Raises:
        UserErrors: their tokenizers differ by more than added tokens, or they have several dtypes.
    """
    from megatron_btx.families.open_checkpoint import open_checkpoint
    from megatron_btx.mix.align_vocab import align_vocab

    errors: list[UserError] = []
    with collect_errors(errors):
        models = [open_checkpoint(Path(path), name) for name, path in taken(recipe).items()]
        found, most = align_vocab(models, "seed")
        return {model.label: model for model in found}, most
    fix = "leave it out, or take dense models of one tokenizer and more added tokens"
    raise UserErrors([UserError("mix.align_vocab", f"{e.where}: {e.what}", fix) for e in errors])


def _other_tokenizer(one: Path, other: Path) -> str:
    """In what the tokenizer of a second checkpoint differs from that of a first."""
    from megatron_btx.families.tokenizer_files import describe_tokenizer, place_of
    from megatron_btx.families.tokenizer_identity import differences

    places = [place_of(one), place_of(other)]
    has = [describe_tokenizer(place) is not None for place in places]
    if one == other or not any(has):
        return ""
    if not all(has):
        return "one comes without its tokenizer's files"
    return "; ".join(differences(*places))


def link(recipe: Recipe, name: str, run_dir: Path) -> dict[str, Any]:
    """Link the checkpoint into the stage's own ``checkpoints/``, or convert it to there.

    Returns:
        ``{"checkpoint": link or directory, "from": what was taken}``.
    """
    source = imported(recipe, name)
    assert source is not None
    origin = run_dir / "seed" if source == "seed" else Path(source)
    directory, manifest = _read(recipe, name, origin)
    checkpoints = stage_directory(run_dir, name) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / f"step_{int(manifest['step']):08d}"
    givers = _givers(recipe, name) if source != "seed" else ()
    if givers or not _is_ours(directory):
        if not target.exists():
            _convert(givers or (f"model={directory}",), target, manifest.get("told", {}))
        return {"checkpoint": str(target.relative_to(run_dir)), "from": str(directory)}
    _whole(directory)
    temporary = unfinished(target)
    temporary.unlink(missing_ok=True)
    inside = source == "seed"  # relative: the run's directory may be moved
    temporary.symlink_to(os.path.relpath(directory, checkpoints) if inside else directory.resolve())
    os.replace(temporary, target)
    return {"checkpoint": str(target.relative_to(run_dir)), "from": str(directory)}


def _whole(directory: Path) -> None:
    """That every byte that the checkpoint names is there: it is opened, nothing is read."""
    from megatron_btx.weights.megatron import open_megatron  # imports torch: ranks only

    open_megatron(directory, "checkpoint")


def _givers(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """Where a model must be put to a larger vocabulary: it and those that give rows, NAME=DIR."""
    if not recipe.mix.align_vocab:
        return ()
    models, most = aligned(recipe)
    own = models[stage.removeprefix("expert:")]
    giver = models[most]
    assert own.path is not None
    assert giver.path is not None
    if not own.longer and not _other_tokenizer(own.path, giver.path):
        return ()
    others = [model for model in models.values() if model is not own]
    return tuple(f"{model.label}={model.path}" for model in (own, *others))


def _convert(sources: tuple[str, ...], target: Path, told: dict[str, Any]) -> None:
    """Somebody else's directory as ours, with its tokenizer; an interrupted one goes on.

    Args:
        sources: NAME=DIR, and those that it gets rows of.
        target: the new step directory.
        told: what it does not say of itself.
    """
    from megatron_btx.families.open_checkpoint import open_checkpoint
    from megatron_btx.mix import offline
    from megatron_btx.mix.request import MixRequest

    model = open_checkpoint(named_path(sources[0])[1], "model", told)
    dtypes = {dtype for _, dtype in model.source.tensors.values()}
    request = MixRequest(
        sources=sources,
        align_vocab=len(sources) > 1,
        out=str(target),
        method="copy",
        format="megatron",
        dtype=None if len(dtypes) == 1 else "fp32",  # of several the one that holds them all
        model=told,
    )
    offline.run(request, io.StringIO(), code_revision())


def _tokenizer(directory: Path, manifest: dict[str, Any]) -> str:
    """How a recipe names the tokenizer beside a checkpoint."""
    from megatron_btx.families.tokenizer_files import place_of

    place = f"path: {place_of(directory)}"
    if _is_ours(directory):
        return f"{{{place}}}"
    kind = (manifest.get("tokenizer") or {}).get("type", "huggingface")
    return f"{{type: {kind}, {place}}}"


def _read(recipe: Recipe, name: str, path: Path) -> tuple[Path, dict[str, Any]]:
    where = f"{recipe_key(name)}.from"
    with errors_of(where):
        directory = find_checkpoint(path, dense=name.removeprefix("expert:"))
    there = is_hugging_face(directory)
    with errors_of(where):
        architecture, manifest = _said(recipe, directory)
    if _is_ours(directory) and not (directory / ".metadata").is_file():
        raise UserError(
            where, f"{directory} is incomplete: .metadata is missing", "copy the checkpoint again"
        )
    if architecture.experts:
        raise UserError(where, f"{directory} is a mixture of experts", "give a dense checkpoint")
    different = [
        f"{field}: {theirs} there, {ours} here"
        for field, theirs, ours in _differences(architecture.model, recipe.model)
    ]
    if different:
        fix = "change `model:` to the checkpoint's, or take another checkpoint"
        if name.startswith("expert:") and recipe.seed.from_ is not None:
            fix = "give an expert that was branched from the seed"
        elif there:
            fix = f"write what `btx convert hf-to-megatron {directory}` prints"
        what = f"{directory} is of another model ({'; '.join(different)})"
        raise UserError(where, what, fix)
    return directory, manifest


def _said(recipe: Recipe, directory: Path) -> tuple[Architecture, dict[str, Any]]:
    """What a directory says of itself, of whatever kind, in the words of a manifest.

    Raises:
        UserErrors: it is damaged, or does not say what the recipe does not say either.
    """
    if _is_ours(directory):
        return read_manifest(directory)
    if is_hugging_face(directory):
        from megatron_btx.families.hf import read_config  # imports torch: only where it is needed
        from megatron_btx.families.tokenizer_files import describe_tokenizer, place_of

        _, architecture, _ = read_config(directory)
        return architecture, {"step": 0, "tokenizer": describe_tokenizer(place_of(directory))}
    from megatron_btx.families.open_checkpoint import open_checkpoint

    tokenizer = recipe.tokenizer.path
    place = None if tokenizer is None else Path(tokenizer)
    told = _told(recipe, directory)
    model = open_checkpoint(directory, "model", told, place)
    size, wanted = model.architecture.vocab_size, recipe.tokenizer.vocab_size
    if size != wanted:
        what = f"has a vocabulary of {size}, the recipe one of {wanted}"
        raise UserError(str(directory), what, f"set `tokenizer: {{vocab_size: {size}}}`")
    return model.architecture, {**model.manifest, "step": 0, "told": {**told, "vocab_size": size}}


def _told(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """What the recipe says of the model and another trainer's checkpoint does not."""
    from megatron_btx.weights.megatron_lm_args import unsaid

    names = {"make_vocab_size_divisible_by", *unsaid(directory)} - {"vocab_size"}
    return {name: getattr(recipe.model, name) for name in names}


def _is_ours(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def _differences(checkpoint: Model, model: Model) -> list[tuple[str, Any, Any]]:
    theirs, ours = (dataclasses.asdict(count.resolved(one)) for one in (checkpoint, model))
    return [
        (name, theirs[name], ours[name])
        for name in ours
        if name not in _FREE and theirs[name] != ours[name]
    ]
