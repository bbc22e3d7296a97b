"""YAML as a tree in which every value still knows its file, line and dotted key.

The plain ``yaml.safe_load`` forgets where a value stood, and an error without a line is half an
error. Two more things it does silently are refused here: a key written twice, and keys that are
not text (``on:`` is a boolean in YAML 1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import UserError


@dataclass(frozen=True, slots=True)
class Node:
    """One value of a YAML file: a mapping or list of nodes, or a scalar."""

    value: Any
    file: Path
    line: int
    key: str
    """The dotted key as it is written in the file (``training.lr``)."""

    @property
    def where(self) -> str:
        """``file:line: key``, the head of an error."""
        return locate(self.file, self.line, self.key)

    @property
    def kind(self) -> str:
        """What a user would call the value."""
        if self.value is None:
            return "nothing"
        names = {dict: "a mapping", list: "a list", bool: "true/false", str: "text"}
        return names.get(type(self.value), "a number")

    def plain(self) -> Any:
        """The value without positions."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def locate(file: Path, line: int, key: str) -> str:
    """The head of an error message: ``file:line: key``."""
    return f"{file}:{line}" + (f": {key}" if key else "")


def read_tree(path: Path) -> Node:
    """The tree of a YAML file.

    Raises:
        UserError: the file is missing, no UTF-8, no YAML or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(str(path), "there is no such file", "give the path of a recipe") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(str(path), f"cannot be read: {reason}", "give a recipe's path") from None
    except UnicodeDecodeError as error:
        raise UserError(
            str(path), f"is not UTF-8 text (byte {error.start})", "save the file as UTF-8"
        ) from None
    return parse_tree(text, path)


def parse_tree(text: str, path: Path) -> Node:
    """The tree of YAML text; ``path`` is what errors name and relative paths start from."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise UserError(str(path), "is empty", "start from a recipe in examples/")
        tree = _Reader(loader, path).node(root, "", ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UserError(
            locate(path, line, ""),
            f"is not YAML: {error.problem or error.context}",
            "look at the indentation, colons and quotes of this line and the one above",
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(str(path), f"is not YAML: {error}", "mend the file's syntax") from None
    finally:
        loader.dispose()
    if not isinstance(tree.value, dict):
        raise UserError(
            locate(path, 1, ""), f"is {tree.kind}, not keys with values", "see examples/"
        )
    return tree


class _Reader:
    def __init__(self, loader: yaml.SafeLoader, path: Path) -> None:
        self.loader, self.path = loader, path

    def node(self, node: yaml.Node, key: str, above: tuple[yaml.Node, ...]) -> Node:
        line = node.start_mark.line + 1
        if any(node is other for other in above):
            raise UserError(locate(self.path, line, key), "contains itself", "remove the alias")
        above = (*above, node)
        if isinstance(node, yaml.MappingNode):
            return Node(self._mapping(node, key, above), self.path, line, key)
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(n, f"{key}[{i}]", above) for i, n in enumerate(node.value)]
            return Node(items, self.path, line, key)
        if node.tag == "tag:yaml.org,2002:int" and re.match("[-+]?0[0-9_]|.*:", node.value):
            raise UserError(
                locate(self.path, line, key),
                f"{node.value} is {self.loader.construct_object(node)} for YAML 1.1, which counts "
                f"{'by sixties' if ':' in node.value else 'by eights after a zero'} there",
                "write it as a plain number, or put it in quotes if text is meant",
            )
        return Node(self.loader.construct_object(node), self.path, line, key)

    def _mapping(
        self, node: yaml.MappingNode, key: str, above: tuple[yaml.Node, ...]
    ) -> dict[str, Node]:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            line = name_node.start_mark.line + 1
            name = name_node.value
            if name_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise UserError(
                    locate(self.path, line, key),
                    f"the key {name} is not text for YAML",
                    f'write "{name}" in quotes' if isinstance(name, str) else "use a plain name",
                )
            if name in lines:
                where = locate(self.path, line, f"{key}.{name}".lstrip("."))
                raise UserError(
                    where, f"stands here and in line {lines[name]}", "remove one of them"
                )
            lines[name] = line
        self.loader.flatten_mapping(node)  # `<<: *anchor`; the block's own keys come last and win
        return {
            name.value: self.node(value, f"{key}.{name.value}".lstrip("."), above)
            for name, value in node.value
        }
