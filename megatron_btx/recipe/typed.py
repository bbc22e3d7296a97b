"""Dataclasses from trees of values: types, ranges and names checked, every problem collected.

Whatever describes a model, a run or a request is read here: a recipe, a file of options, a set of
models, a manifest, the arguments of Megatron-LM. The reader follows the types of the dataclass, so
a new field needs no line here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from megatron_btx.errors import UserError, UserErrors, notice
from megatron_btx.recipe.messages import (
    block_of,
    describe,
    guess,
    homes,
    nearest,
    number,
    options,
    path_problem,
    required,
    show,
    yaml_name,
)
from megatron_btx.recipe.yaml_tree import Node

T = TypeVar("T")

BAD: Any = object()
"""Stands for a value whose error has been noted."""
_MOST, _MOST_KEYS = 50, 20
"""Errors that are told, and unknown keys of a block among them."""


@dataclass
class Reader:
    """Builds values of a type from layers of nodes, the last one winning; collects errors."""

    noun: str = "a recipe"
    """Of what a key should be one, in errors."""
    homes: Sequence[str] = ()
    """Dotted keys to which a key that is unknown where it stands may belong."""
    strict: bool = False
    """Whether text is never a number: of JSON, which has numbers of its own."""
    errors: list[tuple[Node, UserError]] = field(default_factory=list)
    marks: dict[str, Node] = field(default_factory=dict)
    """Where each resolved key (``seed.lr``) was written (line of ``training.lr``)."""

    def error(self, node: Node, what: str, fix: str) -> Any:
        """Note what is wrong with a value."""
        self.errors.append((node, UserError(node.where, what, fix)))
        return BAD

    def raise_errors(self) -> None:
        """All of them, each once, in the order of the file: what a block says that several others
        inherit is met with each of them.

        Raises:
            UserErrors: there are some.
        """
        ordered = sorted(self.errors, key=lambda pair: (str(pair[0].file), pair[0].line))
        found = list({(error.where, error.what): error for _, error in reversed(ordered)}.values())
        found.reverse()
        if len(found) > _MOST:
            left = f"{len(found) - _MOST:,} more errors"
            found = [
                *found[:_MOST],
                UserError(found[_MOST].where, f"and {left}", "mend these first"),
            ]
        if found:
            raise UserErrors(found)

    def instance(self, cls: type, layers: list[Node], key: str, extra: tuple[str, ...] = ()) -> Any:
        """A dataclass from mappings; ``BAD`` if a field without default could not be had."""
        hints = typing.get_type_hints(cls)
        fields = {yaml_name(one.name): one for one in dataclasses.fields(cls)}
        layers = [self._by_new_names(layer, fields) for layer in layers]
        for layer in layers:
            known = {*fields, *extra}
            unknown = {name: node for name, node in layer.value.items() if name not in known}
            self._refuse(unknown, [*fields, *extra], key)
        values: dict[str, Any] = {}
        for name, one in fields.items():
            given = [layer.value[name] for layer in layers if name in layer.value]
            dotted = f"{key}.{name}".lstrip(".")
            if not given and required(one):
                where = Node(None, layers[-1].file, layers[-1].line, dotted)
                self.error(where, "is missing", f"add `{name}:` ({describe(hints[one.name])})")
            if not given or (self._empty(given[-1], hints[one.name]) and not required(one)):
                continue
            value = self.value(hints[one.name], given, dotted)
            value = value if value is BAD else self._allowed(one, value, given[-1])
            if value is not BAD:
                values[one.name] = value
        missing = any(required(one) and one.name not in values for one in fields.values())
        return BAD if missing else cls(**values)

    def _empty(self, node: Node, hint: Any) -> bool:
        """Whether ``null`` is written where no type has a meaning for it: as if it were not there.
        JSON, which no person writes, has none of that."""
        return node.value is None and not self.strict and not _meant_by_null(hint)

    def value(self, hint: Any, layers: list[Node], key: str) -> Any:
        """A value of type ``hint``; ``BAD`` after noting an error."""
        last = layers[-1]
        self.marks[key] = last
        layers = since_null(layers)
        if last.value is None and type(None) in options(hint):
            return None
        kinds = [kind for kind in options(hint) if kind is not type(None)]
        if dataclasses.is_dataclass(kinds[0]):
            return self.block(kinds[0], layers, key)
        is_mapping = [option for option in kinds if typing.get_origin(option) is dict]
        if is_mapping and (isinstance(last.value, dict) or last.value is None or len(kinds) == 1):
            return self._mapping(is_mapping[0], last, layers, key)
        scalars = [option for option in kinds if option not in is_mapping]
        return self._scalar(scalars[0], last, describe(hint))

    def block(self, cls: Any, layers: list[Node], key: str) -> Any:
        """A dataclass from what should be blocks of keys."""
        wrong = [layer for layer in layers if not isinstance(layer.value, dict)]
        if wrong:
            return self.error(
                wrong[0], f"is {wrong[0].kind}, not a block", block_of(cls, wrong[0].value, key)
            )
        if not layers:  # an empty block, nothing to inherit
            layers = [dataclasses.replace(self.marks[key], value={})]
        return self.instance(cls, layers, key)

    def _refuse(self, unknown: dict[str, Node], fields: Iterable[str], key: str) -> None:
        what = f"is not a key of {self.noun}"
        for at, (name, node) in enumerate(unknown.items()):
            if at == _MOST_KEYS:
                left = len(unknown) - at
                self.error(node, f"and {left:,} more of this block: {what}", "remove them")
                break
            self.error(node, what, nearest(name, fields, key, self.homes))

    def _by_new_names(self, layer: Node, fields: dict[str, Any]) -> Node:
        """A block in which keys that have another name now stand under that."""
        new = {old: name for name, f in fields.items() if (old := f.metadata.get("formerly"))}
        if not new.keys() & layer.value.keys():
            return layer
        entries: dict[str, Node] = {}
        for name, node in layer.value.items():
            if name in new and new[name] in layer.value:
                self.error(node, f"is the former name of `{new[name]}`", "remove it")
                continue
            if name in new:
                notice(f"{node.where} is called `{new[name]}` now; this release reads both names")
            entries[new.get(name, name)] = node
        return dataclasses.replace(layer, value=entries)

    def _allowed(self, field: Any, value: Any, node: Node) -> Any:
        """The value, where it is in the field's range; a path made absolute."""
        if field.metadata.get("path") is True:
            return self._path(value, node)
        limits = field.metadata.get("range")
        if limits is None or value is None:
            return value
        parts = [(node, value)]
        if isinstance(value, tuple):
            parts = [(node, item) for item in value]
        elif isinstance(value, dict):
            parts = [(node.value.get(name, node), item) for name, item in value.items()]
        for place, item in parts:
            wrong = limits.problem(item)
            if wrong is not None:
                return self.error(place, *wrong)
        return value

    def _path(self, value: Any, node: Node) -> Any:
        """A path, or several, from the directory of the file in which it is written."""
        if isinstance(value, tuple):
            return tuple(self._path(item, node) for item in value)
        if isinstance(value, dict):
            return {name: self._path(item, node.value[name]) for name, item in value.items()}
        if value is None:
            return None
        wrong = path_problem(value)
        if wrong is not None:
            return self.error(node, wrong, "correct the path")
        here = node.file.parent if node.file is not None else "."
        # As the shell does, a name of no user's is left as it is.
        return os.path.abspath(os.path.join(here, os.path.expanduser(value)))

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
                values[name] = self._plain(nodes[-1])
            elif nodes[-1].value is None and len(nodes) > 1:
                continue  # what a base has is left out
            else:
                values[name] = self.value(item, nodes, f"{key}.{name}")
        return BAD if any(value is BAD for value in values.values()) else values

    def _plain(self, node: Node) -> Any:
        """A value that has no type here."""
        for part in node.parts():
            value = part.plain() if not isinstance(part.value, (dict, list)) else None
            if isinstance(value, float) and not math.isfinite(value):
                return self.error(part, f"is {value}", "give a finite number")
        return node.plain()

    def _scalar(self, hint: Any, node: Node, wanted: str) -> Any:
        value = node.value
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            if isinstance(value, str) and value in choices:
                return value
            return self.error(node, f"is {show(value)}", f"choose {wanted}" + guess(value, choices))
        if typing.get_origin(hint) is tuple:
            items = value if isinstance(value, list) else [node]
            kind = typing.get_args(hint)[0]
            parts = [self._scalar(kind, item, describe(kind)) for item in items]
            return BAD if any(part is BAD for part in parts) else tuple(parts)
        is_number = hint in (int, float) and not (self.strict and isinstance(value, str))
        amount = number(value) if is_number else None
        if hint is int and amount is not None and amount == int(amount):
            return int(amount)
        if hint is float and amount is not None:
            with contextlib.suppress(OverflowError):
                return float(amount)
        if hint in (bool, str) and isinstance(value, hint):
            return value
        fix = f"give {wanted}" + (
            ", such as 4096, 60k or 2.4M" if hint is int and is_number else ""
        )
        if hint is str and value is not None and not isinstance(value, (dict, list)):
            fix = "put it in quotes if text is meant"
        return self.error(node, f"is {show(value)}, not {wanted}", fix)


def read(cls: type[T], tree: Node, noun: str, *, strict: bool = False) -> T:
    """A dataclass from a tree.

    Args:
        cls: its type.
        tree: a mapping of its fields.
        noun: of what a key should be one, in errors.
        strict: whether text is never a number (JSON).

    Raises:
        UserErrors: everything that is wrong with it, at once.
    """
    reader = Reader(noun=noun, homes=homes(cls), strict=strict)
    found: T = reader.block(cls, [tree], tree.key)
    reader.raise_errors()
    return found


def since_null(layers: list[Node]) -> list[Node]:
    """The layers that count: an empty key forgets what those below it say."""
    nulls = [i for i, layer in enumerate(layers) if layer.value is None]
    return layers[nulls[-1] + 1 :] if nulls else layers


def _meant_by_null(hint: Any) -> bool:
    """Whether ``null`` is a value of a type, or stands for an empty block."""
    kinds = options(hint)
    return type(None) in kinds or all(
        dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict for kind in kinds
    )
