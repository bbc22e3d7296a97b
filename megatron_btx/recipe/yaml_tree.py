"""YAML, and what was read from elsewhere, as a tree in which every value knows where it stood.

The plain ``yaml.safe_load`` forgets where a value stood, and an error without a line is half an
error. What it takes without a word is refused here: a key written twice, keys that are not text
(``on:`` is a boolean in YAML 1.1), numbers by eights and sixties. So is what would not end: deep
nesting, aliases that multiply, files beyond all size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import UserError
from megatron_btx.files import read_bytes

YAML_LIMIT = 1 << 20
"""Bytes of a YAML file: a recipe of 500 experts with every default written out."""
_DEPTH = 50
"""Levels of lists and mappings; a recipe has 5."""
_VALUES = 50_000
"""Values in a file, those that an alias repeats counted as often as they are repeated."""
_DIGITS = 3000
"""Of an integer: Python reads no longer ones."""
EXPONENT = re.compile(r"[-+]?(\d[\d_]*)?\.?\d[\d_]*[eE][-+]?\d+")
"""Text that YAML 1.1 has no number in, and a recipe has: :meth:`Node.plain`."""
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_MERGE = "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Node:
    """One value: a mapping or list of nodes, or a scalar."""

    value: Any
    file: Path | None
    """``None``: it stands in no file (a flag)."""
    line: int
    """0: the format has none (JSON)."""
    key: str
    """The dotted key as it is written in the file (``training.lr``)."""
    quoted: bool = False
    """Whether it is text by its quotes."""

    @property
    def where(self) -> str:
        """``file:line: key``, the head of an error."""
        return locate(self.file, self.line, self.key)

    @property
    def kind(self) -> str:
        """What a user would call the value."""
        if self.value is None:
            return "nothing"
        names = {
            dict: "a mapping", list: "a list", tuple: "a list", bool: "true/false", str: "text",
            int: "a number", float: "a number",
        }  # fmt: skip
        return names.get(type(self.value), f"a {type(self.value).__name__}")

    def parts(self) -> Iterator[Node]:
        """This value and all within it."""
        yield self
        inside = self.value.values() if isinstance(self.value, dict) else self.value
        for node in inside if isinstance(self.value, (dict, list)) else ():
            yield from node.parts()

    def plain(self) -> Any:
        """The value without positions; ``1e-4``, text for YAML 1.1, is a number."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if isinstance(self.value, str) and not self.quoted and EXPONENT.fullmatch(self.value):
            return float(self.value.replace("_", ""))
        return self.value


def locate(file: Path | None, line: int, key: str) -> str:
    """The head of an error message: ``file:line: key``."""
    place = f"{file}:{line}" if line else str(file or "")
    return ": ".join(filter(None, (place, key)))


def tree_of(content: Any, file: Path | None, key: str = "") -> Node:
    """The tree of plain values (JSON, flags), which have a file and keys but no lines."""
    if isinstance(content, Mapping):
        below = {str(k): tree_of(v, file, f"{key}.{k}".lstrip(".")) for k, v in content.items()}
        return Node(below, file, 0, key)
    if isinstance(content, (list, tuple)):
        return Node([tree_of(v, file, f"{key}[{i}]") for i, v in enumerate(content)], file, 0, key)
    return Node(content, file, 0, key, quoted=True)


def read_tree(path: Path, wanted: str = "a recipe") -> Node:
    """The tree of a YAML file.

    Args:
        path: the file.
        wanted: what it should be, as errors call it.

    Raises:
        UserError: the file is missing, a pipe or a device, too large, no UTF-8, no YAML or not a
            mapping, or has what this module refuses.
    """
    content = read_bytes(path, YAML_LIMIT, wanted)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start})"
        raise UserError(str(path), what, "save the file as UTF-8") from None
    return parse_tree(text, path, wanted)


def parse_tree(text: str, path: Path, wanted: str = "a recipe") -> Node:
    """The tree of YAML text; ``path`` is what errors name and relative paths start from."""
    see = "start from a recipe in examples/" if wanted == "a recipe" else f"write {wanted}"
    try:
        root = _compose(text)
        if root is None:
            raise UserError(str(path), "is empty", see)
        tree = _Reader(path).node(root, "", ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(
            locate(path, line, ""),
            f"is not YAML: {error.problem or error.context}",
            "look at the indentation, colons and quotes of this line and the one above",
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(
            locate(path, line, ""),
            f"is not YAML: it has the control character U+{error.character:04X}",
            "remove it",
        ) from None
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, a version of digits
        what = f"is not YAML: {str(error)[:100]}"
        raise UserError(str(path), what, "look for a `\\U` or a `%` that is not meant") from None
    except RecursionError:
        raise UserError(str(path), "is nested too deep", "write it without aliases") from None
    if not isinstance(tree.value, dict):
        raise UserError(locate(path, 1, ""), f"is {tree.kind}, not keys with values", see)
    return tree


def _compose(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Stops reading where nesting or the number of values is beyond all sense."""

    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.values += 1
        if self.depth > _DEPTH or self.values > 2 * _VALUES:  # keys are values here
            what = f"nested more than {_DEPTH} deep" if self.depth > _DEPTH else "more values than"
            what += "" if self.depth > _DEPTH else f" any recipe has ({_VALUES:,})"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """From PyYAML's nodes, whose scalars are text with a tag, to ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = 0
        self.pairs: dict[int, dict[str, yaml.Node]] = {}
        self.constructor = yaml.constructor.SafeConstructor()

    def node(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Node:
        line = node.start_mark.line + 1
        self._refuse_circle(node, key, above)
        self.values += 1
        if self.values > _VALUES:
            what = f"has more than {_VALUES:,} values, those that its aliases repeat among them"
            raise UserError(locate(self.path, line, key), what, "write it without aliases")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, key, above), self.path, line, key)
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(n, f"{key}[{i}]", above) for i, n in enumerate(node.value)]
            return Node(items, self.path, line, key)
        assert isinstance(node, yaml.ScalarNode)
        value = self._scalar(node, locate(self.path, line, key))
        return Node(value, self.path, line, key, quoted=node.style is not None)

    def _refuse_circle(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> None:
        if any(node is other for other in above):
            where = locate(self.path, node.start_mark.line + 1, key)
            raise UserError(where, "contains itself", "remove the alias")

    def _scalar(self, node: yaml.ScalarNode, where: str) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        if node.tag not in _PLAIN_TAGS:
            if node.tag == "tag:yaml.org,2002:timestamp" and node.style is None:
                return text  # a date is text for whoever reads it
            raise UserError(where, f"has the tag {node.tag}", "write plain text or a plain number")
        if kind == "int" and len(text) > _DIGITS:
            what = f"is a number of {len(text)} digits"
            raise UserError(where, what, "give one that can be meant")
        try:
            value = self.constructor.construct_object(node)
        except (ValueError, LookupError, AttributeError):  # `!!int x`
            raise UserError(where, f"is no {kind}", "write it without a tag") from None
        if kind == "int" and re.match("[-+]?0[0-9_]|.*:", text) or kind == "float" and ":" in text:
            raise UserError(
                where,
                f"{text} is {value} for YAML 1.1, which counts "
                f"{'by sixties' if ':' in text else 'by eights after a zero'} there",
                "write it as a plain number, or put it in quotes if text is meant",
            )
        return value

    def _mapping(
        self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]
    ) -> dict[str, Node]:
        return {
            name: self.node(value, f"{key}.{name}".lstrip("."), above)
            for name, value in self._entries(node, key, above).items()
        }

    def _entries(
        self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]
    ) -> dict[str, yaml.Node]:
        """A block's own entries over those that it takes in by ``<<: *anchor``."""
        if id(node) not in self.pairs:
            self.pairs[id(node)] = self._merged(node, key, above)
        return self.pairs[id(node)]

    def _merged(
        self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]
    ) -> dict[str, yaml.Node]:
        lines: dict[str, int] = {}
        taken: dict[str, yaml.Node] = {}
        own: dict[str, yaml.Node] = {}
        for name_node, value in node.value:
            line, name = name_node.start_mark.line + 1, name_node.value
            if name_node.tag not in ("tag:yaml.org,2002:str", _MERGE):
                raise UserError(
                    locate(self.path, line, key),
                    f"the key {name if isinstance(name, str) else 'here'} is not text for YAML",
                    f'write "{name}" in quotes' if isinstance(name, str) else "use a plain name",
                )
            if name in lines:
                where = locate(self.path, line, f"{key}.{name}".lstrip("."))
                what = f"is set twice (also in line {lines[name]})"
                raise UserError(where, what, "remove one of them")
            lines[name] = line
            if name_node.tag == _MERGE:
                for part in self._parts(value, key, line):
                    self._refuse_circle(part, key, above)
                    taken |= self._entries(part, key, (*above, part))
            else:
                own[name] = value
        return {**taken, **own}

    def _parts(self, value: yaml.Node, key: str, line: int) -> Iterator[yaml.MappingNode]:
        """What ``<<`` names, the strongest (the first of several) last."""
        several = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for part in reversed(several):
            if not isinstance(part, yaml.MappingNode):
                where = locate(self.path, line, f"{key}.<<".lstrip("."))
                raise UserError(where, "takes in what is no mapping", "name blocks of keys")
            yield part
