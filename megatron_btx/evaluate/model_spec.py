"""What is to be evaluated: one checkpoint, or several that are averaged. Imports no torch.

On the command line it is one word: a directory (a step directory of ours, a stage's, a Hugging Face
model's), ``btm:DIR,DIR,...``, ``btm:RUN_DIR``, or a YAML file that describes a BTM set. In front of
each may stand ``NAME=``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import named_word
from megatron_btx.recipe.fields import PATH, within
from megatron_btx.recipe.typed import BAD, Reader
from megatron_btx.recipe.yaml_tree import read_tree
from megatron_btx.weights.find_checkpoint import find_checkpoint, name_of

METHODS = ("top1", "top2", "posterior")
_FORM = """method: top2          # top1, top2 or posterior
models: {code: DIR, math: DIR, seed: DIR}      # the seed last
text: {code: code.jsonl, math: math.jsonl, seed: web.jsonl}     # for top1 and top2"""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, or a Branch-Train-Merge set of models."""

    name: str
    models: Mapping[str, Path]
    """Name -> checkpoint, found and there; a single model's name is its own."""
    method: str | None = None
    """How a set is averaged (``METHODS``); ``None``: a single model."""
    context: str = "prefix"
    """What top1 and top2 look at: what is known so far, or the prompt (of held-out text: all of
    it)."""
    text: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """JSONL files of what each model was trained on, for top1 and top2."""
    prior: Mapping[str, float] | None = None
    """Of the posterior; ``None``: uniform."""
    experts: tuple[str, ...] = ()
    """Of an MoE these only; none: all."""
    run_dir: Path | None = None
    """The run that the set is of: its prepared text stands for ``text``."""

    @property
    def first(self) -> Path:
        """The first checkpoint: its tokenizer is the set's."""
        return next(iter(self.models.values()))


def run_of(checkpoint: Path) -> Path | None:
    """The run whose directory a checkpoint (a step's directory, an export) lies in."""
    for place in list(checkpoint.absolute().parents)[:4]:
        if (place / "recipe.yaml").is_file() and (place / "prepare").is_dir():
            return place
    return None


def parse(words: list[str]) -> list[Subject]:
    """Subjects of a command line.

    Raises:
        UserErrors: everything that is wrong with any of them; two of one name.
    """
    found: list[Subject] = []
    errors: list[UserError] = []
    for word in words:
        try:
            found.append(_parse(word))
        except UserErrors as several:
            errors += several.errors
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserErrors(errors)
    return _told_apart(found)


def with_experts(subjects: list[Subject], given: str) -> list[Subject]:
    """The subjects with some of their experts only, as ``--experts code,seed`` says.

    Raises:
        UserError: a subject is a set of models, or an expert has no name or is given twice.
    """
    names = tuple(name.strip() for name in given.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UserError("--experts", f"is {given!r}", "give each expert's name once: code,seed")
    for subject in subjects:
        if subject.method is not None:
            what = f"applies to one MoE, and {subject.name} is a set of models (BTM)"
            raise UserError("--experts", what, "give one MoE, or name fewer models in the set")
    return [replace(subject, experts=names) for subject in subjects]


def set_files(words: list[str]) -> list[Path]:
    """The files among the words of a command line that describe sets."""
    rests = [_named(word)[1] for word in words]
    return [Path(rest) for rest in rests if rest.endswith(_SUFFIXES)]


_SUFFIXES = (".yaml", ".yml")


def _named(word: str) -> tuple[str, str]:
    """The name in front, if any, and the rest."""
    return ("", word) if word.startswith("btm:") else named_word(word)


def _parse(word: str) -> Subject:
    name, rest = _named(word)
    if rest.startswith("btm:"):
        return _listed(name or "btm", rest.removeprefix("btm:"))
    if rest.endswith(_SUFFIXES):
        return _described(name or Path(rest).stem, Path(rest))
    path = find_checkpoint(rest)
    return Subject(name=name or name_of(path), models={"model": path})


def _listed(name: str, rest: str) -> Subject:
    if (Path(rest) / "recipe.yaml").is_file():
        return _of_run(name, Path(rest))
    labels, checkpoints = [], []
    for word in rest.split(","):
        label, path = named_word(word)
        labels.append(label)
        checkpoints.append(find_checkpoint(path))
    if len(set(checkpoints)) < 2:
        raise UserError(f"btm:{rest}", "names fewer than two different models", "give two or more")
    return Subject(name=name, models=_members(labels, checkpoints), method="posterior")


def _members(labels: list[str], checkpoints: list[Path]) -> dict[str, Path]:
    """A set's models by name: the label, or the directory's; equal ones get their parents' in
    front, as :func:`_told_apart` has it.

    Raises:
        UserError: two have one name still.
    """
    short = [label or name_of(path) for label, path in zip(labels, checkpoints, strict=True)]
    models: dict[str, Path] = {}
    for label, name, path in zip(labels, short, checkpoints, strict=True):
        name = name if label or short.count(name) == 1 else _with_parents(path, name)
        if models.get(name, path) != path:
            what = f"is the name of both {models[name]} and {path}"
            raise UserError(name, what, "write NAME=DIR, each name once")
        models[name] = path
    return models


def _of_run(name: str, run_dir: Path) -> Subject:
    """Experts and seed of a run, averaged as its recipe says."""
    from megatron_btx.recipe.load import load_recipe
    from megatron_btx.recipe.stages import directory, model_stage

    recipe = load_recipe(run_dir / "recipe.yaml")
    if recipe.btm.method not in METHODS:
        raise UserError(
            str(run_dir / "recipe.yaml"),
            f"btm.method: {recipe.btm.method} makes one model of the set",
            "evaluate that one (its stage's directory), or describe the set in a YAML file",
        )
    names = recipe.model_names
    if len(names) < 2:
        raise UserError(
            str(run_dir / "recipe.yaml"), f"mixes {names[0]} alone", "name the run of two or more"
        )
    places = {model: directory(run_dir, model_stage(model)) for model in names}
    return Subject(
        name=name,
        models={model: find_checkpoint(place) for model, place in places.items()},
        method=recipe.btm.method,
        run_dir=run_dir,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Set:
    """The keys of a file that describes a set."""

    models: dict[str, str] = field(metadata=PATH)
    method: Literal["top1", "top2", "posterior"] = "posterior"
    context: Literal["prefix", "document"] = "prefix"
    text: dict[str, tuple[str, ...]] = field(default_factory=dict, metadata=PATH)
    prior: dict[str, float] | None = within(1e-12, default=None)


def _described(name: str, path: Path) -> Subject:
    tree = read_tree(path, "a set of models")
    if not isinstance(tree.value.get("models", tree).value, dict) or "models" not in tree.value:
        raise UserError(str(path), "describes no set of models", f"write\n{_FORM}")
    reader = Reader(noun="a set of models")
    given = reader.instance(_Set, [tree], "")
    if given is not BAD:
        _check(given, reader)
    reader.raise_errors()
    return Subject(
        name=name,
        models={label: find_checkpoint(one) for label, one in given.models.items()},
        method=given.method,
        context=given.context,
        text=given.text,
        prior=given.prior,
    )


def _check(given: _Set, reader: Reader) -> None:
    """What no single key of a set can tell."""
    marks = reader.marks
    if len(given.models) < 2:
        reader.error(marks["models"], "are fewer than two", "name two or more")
    if given.method in ("top1", "top2"):
        missing = sorted(given.models.keys() - given.text.keys())
        if missing:
            what = f"lacks {', '.join(missing)}: {given.method} compares with it"
            where = marks.get("text", replace(marks["method"], key="text"))
            reader.error(where, what, "name JSONL files of each")
    if given.prior is not None and given.prior.keys() != given.models.keys():
        what = "is not a positive number for each model"
        reader.error(marks["prior"], what, f"name {', '.join(given.models)}")


def _told_apart(subjects: list[Subject]) -> list[Subject]:
    """Names of directories may be equal; those get their parents' in front."""
    names = [subject.name for subject in subjects]
    double = {name for name in names if names.count(name) > 1}
    if not double:
        return subjects
    longer = [_with_parents(subject.first, subject.name) for subject in subjects]
    renamed = [
        Subject(**{**_fields(subject), "name": name}) if subject.name in double else subject
        for subject, name in zip(subjects, longer, strict=True)
    ]
    if len({subject.name for subject in renamed}) < len(renamed):
        raise UserError(
            "checkpoints", f"{sorted(double)[0]} is named twice", "write NAME=CHECKPOINT"
        )
    return renamed


def _with_parents(checkpoint: Path, name: str) -> str:
    """A checkpoint's name with its parents' in front; ``name`` where it has no parent."""
    parts = [part for part in checkpoint.absolute().parts if part != "checkpoints"]
    return "/".join(parts[-3:]) or name


def _fields(subject: Subject) -> dict[str, Any]:
    return {name: getattr(subject, name) for name in subject.__dataclass_fields__}
