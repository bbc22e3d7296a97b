"""The examples that come along, wherever the package is installed: ``megatron_btx/examples`` is
package data, and in a checkout a link to ``examples/``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import written
from megatron_btx.recipe.messages import near_key
from megatron_btx.recipe.yaml_tree import read_tree

EXAMPLES = (Path(__file__).parent.parent / "examples").resolve()
_KINDS = (".yaml", ".py", ".md")
"""What is an example's own; text and runs that lie beside it are not."""


def names() -> list[str]:
    """The examples: a directory of recipes, or a script."""
    found = [path.name for path in EXAMPLES.iterdir() if _own_files(path)]
    return sorted([*found, *(path.stem for path in EXAMPLES.glob("*.py"))])


def write_out(asked: Sequence[str], out: Path) -> list[Path]:
    """Copy examples, and the recipes that theirs start from, into ``out`` as they lie in the tree.

    Args:
        asked: of :func:`names`.
        out: a directory, which is made.

    Returns:
        What is there now; a file that was there with this content stays as it is.

    Raises:
        UserErrors: there is no such example, or another file in its place; nothing is written.
    """
    known, errors = names(), []
    for name in asked:
        if name not in known:
            fix = f"use one of {', '.join(known)}{near_key(name, known)}"
            errors.append(UserError(f"--example {name}", "there is no such example", fix))
    if errors:
        raise UserErrors(errors)
    files = {path: path.read_bytes() for name in asked for path in _files(name)}
    places = {out / path.relative_to(EXAMPLES): content for path, content in files.items()}
    left = {}
    for place, content in places.items():
        if not place.exists():
            left[place] = content
        elif not place.is_file() or place.read_bytes() != content:
            what = "is something else already"
            errors.append(UserError(str(place), what, "move it away, or give another --out"))
    if errors:
        raise UserErrors(errors)
    for place, content in left.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        with written(place, "wb") as file:
            file.write(content)
    return sorted(places)


def _files(name: str) -> Iterator[Path]:
    script = EXAMPLES / f"{name}.py"
    for path in [script] if script.is_file() else _own_files(EXAMPLES / name):
        yield path
        while path.suffix == ".yaml":
            base = read_tree(path).value.get("base")
            if base is None:
                break
            path = (path.parent / base.value).resolve()
            yield path


def _own_files(directory: Path) -> list[Path]:
    if not directory.is_dir() or directory.name == "__pycache__":
        return []
    files = sorted(path for path in directory.iterdir() if path.suffix in _KINDS)
    return [path for path in files if path.is_file()]
