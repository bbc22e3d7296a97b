"""YAML -> the frozen dataclasses of schema.py, and back.

The reader follows the types of the schema, so a new field needs no line here. It collects every
problem before it raises, each with file, line, key and fix.

Three conveniences, all resolved on reading (``dump`` writes the result out in full):

- ``training:`` at the top gives defaults that every stage inherits key by key; the blocks inside
  (``layout``, ``megatron``) merge, a mixture (``data``) is one value and replaces.
- ``base: other.yaml`` starts from another recipe, key by key in the same way.
- Counts may be written ``4_000_000``, ``4e6``, ``4M`` or ``80B``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import find_json, newest_step
from megatron_btx.recipe import check, stages
from megatron_btx.recipe.messages import (
    describe,
    guess,
    nearest,
    number,
    options,
    path_problem,
    show,
    yaml_name,
)
from megatron_btx.recipe.schema import Domain, Mix, Recipe, Tokenizer, Training
from megatron_btx.recipe.yaml_tree import Node, parse_tree, read_tree

_BAD: Any = object()  # stands for a value whose error has been noted

_PATH_FIELDS = {
    (Domain, "train"),
    (Domain, "valid"),
    (Tokenizer, "path"),
    (Training, "from_"),
    (Mix, "centroids"),
}
"""Resolved against the directory of the file in which they are written."""


def load_recipe(path: str | Path, base: str | Path | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: the file.
        base: a recipe that takes the place of the one named by ``base:`` in it.

    Raises:
        UserErrors: everything that is wrong with it, at once.
    """
    tree = read_tree(Path(path))
    if base is None:
        return _build(_with_bases(tree, ()))
    return _build([*_with_bases(read_tree(Path(base)), ()), tree])


def parse_recipe(text: str, path: str | Path = "recipe.yaml") -> Recipe:
    """The recipe in a YAML text; ``path`` is what errors name and relative paths start from."""
    return _build(_with_bases(parse_tree(text, Path(path)), ()))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default resolved; ``parse_recipe(dump(r)) == r``."""
    return yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True, width=100)


def digest(part: Any) -> str:
    """Content hash (sha256, hex) of a dataclass, or of plain values around some.

    Equal content gives an equal hash on every machine. The order of a mapping counts: the order of
    ``experts`` is the order of the MoE's experts. A field at its default does not count, so that a
    new option leaves the hash of what was made before it as it was; who changes what a default
    means gives the field another name.
    """
    plain = _plain(part, written=_differs)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any, written: Callable[[Any, Any], bool] = lambda value, field: True) -> Any:
    """Dataclasses as mappings, of those fields that ``written(value, field)`` admits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            yaml_name(field.name): _plain(getattr(value, field.name), written)
            for field in dataclasses.fields(value)
            if written(getattr(value, field.name), field)
        }
    if isinstance(value, dict):
        return {key: _plain(item, written) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, written) for item in value]
    return value


def _differs(value: Any, field: Any) -> bool:
    """Whether a field says something else than its default."""
    if field.default is not dataclasses.MISSING:
        return bool(value != field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value != field.default_factory())
    return True


def _with_bases(tree: Node, seen: tuple[Path, ...]) -> list[Node]:
    """The tree behind those it starts from: a later one wins key by key."""
    base = tree.value.get("base")
    if base is None:
        return [tree]
    if not isinstance(base.value, str):
        raise UserError(base.where, f"is {base.kind}, not a path", "base: other.yaml")
    wrong = path_problem(base.value)
    if wrong is not None:
        raise UserError(base.where, wrong, "base: other.yaml")
    seen = (*seen, tree.file.resolve())
    path = tree.file.parent / base.value
    if path.resolve() in seen:
        raise UserError(base.where, f"{base.value} starts from this recipe", "remove one `base:`")
    return [*_with_bases(read_tree(path), seen), tree]


def _build(layers: list[Node]) -> Recipe:
    builder = _Builder(layers)
    recipe = builder.instance(Recipe, layers, "", extra=("training", "base"))
    if recipe is not _BAD:
        recipe = _derive(recipe)
        builder.check(recipe)
        if not builder.errors:
            recipe = builder.match_dense(recipe)
    builder.raise_errors()
    return recipe


def _derive(recipe: Recipe) -> Recipe:
    """Fill in what follows from the rest: the run's directory, an expert's own domain."""
    experts = {
        name: expert
        if expert.data or name not in recipe.domains
        else dataclasses.replace(expert, data={name: 1.0})
        for name, expert in recipe.experts.items()
    }
    run_dir = recipe.run_dir.replace("{name}", recipe.name)
    tokenizer, seed = recipe.tokenizer, recipe.seed.from_
    taken = None if seed is None or tokenizer.path else _taken_vocabulary(Path(seed))
    if taken is not None:
        tokenizer = dataclasses.replace(tokenizer, vocab_size=taken)
    return dataclasses.replace(recipe, experts=experts, run_dir=run_dir, tokenizer=tokenizer)


def _taken_vocabulary(seed: Path) -> int | None:
    """Size of the vocabulary that comes along with a checkpoint, Megatron's or Hugging Face's;
    whether there is a whole one is asked later (pipeline/import_checkpoint.py)."""
    try:
        directory = seed if (seed / "manifest.json").exists() else newest_step(seed) or seed
        manifest = find_json(directory / "manifest.json")
        return int((manifest or find_json(directory / "config.json") or {})["vocab_size"])
    except (OSError, KeyError, ValueError, TypeError):
        return None


class _Builder:
    """Builds values of a type from layers of nodes, the last one winning; collects errors."""

    def __init__(self, roots: list[Node]) -> None:
        self.errors: list[tuple[Node, UserError]] = []
        self.root = roots[-1]
        self.marks: dict[str, Node] = {}
        """Where each resolved key (``seed.lr``) was written (line of ``training.lr``)."""
        self.defaults = [root.value["training"] for root in roots if "training" in root.value]

    def error(self, node: Node, what: str, fix: str) -> Any:
        self.errors.append((node, UserError(node.where, what, fix)))
        return _BAD

    def raise_errors(self) -> None:
        """All of them, each once, in the order of the file."""
        ordered = sorted(self.errors, key=lambda pair: (str(pair[0].file), pair[0].line))
        if ordered:
            raise UserErrors(list({str(error): error for _, error in ordered}.values()))

    def check(self, recipe: Recipe) -> None:
        """Note what check.py finds, except in blocks that have an error of their own already: what
        it found there may be about the default that stands in for the mistaken value."""
        broken = {node.key.split(".")[0] for node, _ in self.errors}
        for key, what, fix in check.problems(recipe):
            near, node = key, self.marks.get(key)
            while node is None and near:
                near = near.rpartition(".")[0]
                node = self.marks.get(near) if near else self.root
            assert node is not None
            written = node.key + key.removeprefix(near)
            if not broken & {written.split(".")[0], key.split(".")[0]}:
                self.error(Node(None, node.file, node.line, written), what, fix)

    def match_dense(self, recipe: Recipe) -> Recipe:
        """Give the dense baseline the tokens of all it is compared with. Its mixtures are those of
        ``stages.reads``; what ``training:`` says about either is not meant for it."""
        if recipe.dense is None:
            return recipe
        tokens = stages.data_matched_tokens(recipe)
        for name, right in (
            ("tokens", recipe.dense.tokens == tokens),
            ("data", not recipe.dense.data),
        ):
            node = self.marks.get(f"dense.{name}")
            if node is not None and node.key.startswith("dense") and not right:
                what = "is derived: the experts' data and then the finetuning's, token by token"
                self.error(node, what, "remove it")
        return dataclasses.replace(
            recipe, dense=dataclasses.replace(recipe.dense, tokens=tokens, data={})
        )

    def instance(self, cls: type, layers: list[Node], key: str, extra: tuple[str, ...] = ()) -> Any:
        """A dataclass from mappings; ``_BAD`` if a field without default could not be had."""
        hints = typing.get_type_hints(cls)
        fields = {yaml_name(field.name): field for field in dataclasses.fields(cls)}
        for layer in layers:
            for name, node in layer.value.items():
                if name not in fields and name not in extra:
                    self.error(node, "is not a key of a recipe", nearest(name, fields, key))
        values: dict[str, Any] = {}
        missing = False
        for name, field in fields.items():
            given = [layer.value[name] for layer in layers if name in layer.value]
            dotted = f"{key}.{name}".lstrip(".")
            required = (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            )
            if not given:
                if required:
                    where = Node(None, layers[-1].file, layers[-1].line, dotted)
                    self.error(
                        where, "is missing", f"add `{name}:` ({describe(hints[field.name])})"
                    )
                    missing = True
                continue
            value = self.value(hints[field.name], given, dotted)
            if value is _BAD:
                missing |= required
                continue
            if (cls, field.name) in _PATH_FIELDS:
                value = self.path(value, given[-1])
            values[field.name] = value
        return _BAD if missing else cls(**values)

    def path(self, value: Any, node: Node) -> Any:
        """A path, or several, from the directory of the file in which it is written."""
        if isinstance(value, tuple):
            return tuple(self.path(item, node) for item in value)
        if value is None:
            return None
        wrong = path_problem(value)
        if wrong is not None:
            return self.error(node, wrong, "correct the path")
        # As the shell does, a name of no user's is left as it is.
        return os.path.abspath(node.file.parent / os.path.expanduser(value))

    def value(self, hint: Any, layers: list[Node], key: str) -> Any:
        """A value of type ``hint``; ``_BAD`` after noting an error."""
        last = layers[-1]
        self.marks[key] = last
        nulls = [i for i, layer in enumerate(layers) if layer.value is None]
        if nulls:  # an empty key forgets what the layers below say
            layers = layers[nulls[-1] + 1 :]
        if last.value is None and type(None) in options(hint):
            return None
        kinds = [kind for kind in options(hint) if kind is not type(None)]
        if dataclasses.is_dataclass(kinds[0]):
            return self._block(kinds[0], layers, key)
        is_mapping = [option for option in kinds if typing.get_origin(option) is dict]
        if is_mapping and (isinstance(last.value, dict) or last.value is None or len(kinds) == 1):
            return self._mapping(is_mapping[0], last, layers, key)
        scalars = [option for option in kinds if option not in is_mapping]
        return self._scalar(scalars[0], last, describe(hint))

    def _block(self, cls: Any, layers: list[Node], key: str) -> Any:
        if cls is Training:
            layers = [*(node for node in self.defaults if node.value is not None), *layers]
        wrong = [layer for layer in layers if not isinstance(layer.value, dict)]
        if wrong:
            names = ", ".join(yaml_name(field.name) for field in dataclasses.fields(cls)[:4])
            return self.error(
                wrong[0],
                f"is {wrong[0].kind}, not a block",
                f"give keys under it: {names}, ...",
            )
        if not layers:  # an empty block, nothing to inherit
            layers = [dataclasses.replace(self.marks[key], value={})]
        return self.instance(cls, layers, key)

    def _mapping(self, hint: Any, last: Node, layers: list[Node], key: str) -> Any:
        item = typing.get_args(hint)[1]
        if last.value is not None and not isinstance(last.value, dict):
            return self.error(last, f"is {last.kind}, not a mapping", "write `name: value` lines")
        merged: dict[str, list[Node]] = {}
        # A mixture is one value: half of one under half of another would be neither.
        for layer in layers if item is not float else layers[-1:]:
            for name, node in layer.value.items() if isinstance(layer.value, dict) else ():
                merged.setdefault(name, []).append(node)
        values: dict[str, Any] = {}
        for name, nodes in merged.items():
            if item is Any:
                self.marks[f"{key}.{name}"] = nodes[-1]
                values[name] = nodes[-1].plain()
            else:
                values[name] = self.value(item, nodes, f"{key}.{name}")
        return _BAD if any(value is _BAD for value in values.values()) else values

    def _scalar(self, hint: Any, node: Node, wanted: str) -> Any:
        value = node.value
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            if value in choices and not isinstance(value, bool):
                return value
            return self.error(node, f"is {show(value)}", f"choose {wanted}" + guess(value, choices))
        if typing.get_origin(hint) is tuple:
            items = value if isinstance(value, list) else [node]
            kind = typing.get_args(hint)[0]
            parts = [self._scalar(kind, item, describe(kind)) for item in items]
            return _BAD if any(part is _BAD for part in parts) else tuple(parts)
        amount = number(value) if hint in (int, float) else None
        if hint is int and amount is not None and amount == int(amount):
            return int(amount)
        if hint is float and amount is not None:
            with contextlib.suppress(OverflowError):
                return float(amount)
        if hint is bool and isinstance(value, bool):
            return value
        if hint is str and isinstance(value, str):
            return value
        fix = f"give {wanted}"
        if hint is str and value is not None and not isinstance(value, (dict, list)):
            fix = "put it in quotes if text is meant"
        return self.error(node, f"is {show(value)}, not {wanted}", fix)
