"""The files and directories that a recipe names: whether they are there, with something in them.
What is *in* a data file is read by ``prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.recipe.check import stages
from megatron_btx.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class BadPath:
    """A path that a recipe names, with nothing to read in it."""

    key: str
    path: str
    what: str
    fix: str


def bad_paths(recipe: Recipe) -> list[BadPath]:
    """Every file and directory the recipe names that is not there, or empty."""
    found: list[BadPath] = []

    def look(key: str, name: str, *, directory: bool = False) -> None:
        path = Path(name)
        if not path.exists() and Path(f"{name}.idx").exists() and not directory:
            return  # a Megatron pair by its prefix, which `prepare` looks at
        if not path.exists():
            found.append(BadPath(key, str(path), "does not exist", _absent(path, key)))
        elif directory and not path.is_dir():
            fix = "give the checkpoint's directory"
            found.append(BadPath(key, str(path), "is a file", fix))
        elif path.is_dir() and not any(path.iterdir()):
            fix = "put the files there"
            found.append(BadPath(key, str(path), "is an empty directory", fix))
        elif path.is_file() and path.stat().st_size == 0:
            found.append(BadPath(key, str(path), "is empty", "give a file with text in it"))

    for name, domain in recipe.domains.items():
        for part, paths in (("train", domain.train), ("valid", domain.valid)):
            for path in paths:
                look(f"domains.{name}.{part}", path)
    if recipe.tokenizer.path is not None:
        look("tokenizer.path", recipe.tokenizer.path)
    if recipe.mix.centroids is not None:
        look("mix.centroids", recipe.mix.centroids)
    for key, stage in stages(recipe).items():
        if stage.from_ is not None:
            look(f"{key}.from", stage.from_, directory=True)
    return found


def files(*recipes: Recipe) -> None:
    """That every file and directory the recipes name is there and not empty.

    Raises:
        UserErrors: all that are missing, each once.
    """
    bad = dict.fromkeys(one for recipe in recipes for one in bad_paths(recipe))
    directories: dict[Path, list[BadPath]] = {}
    for one in bad:
        if not Path(one.path).parent.exists():
            directories.setdefault(Path(one.path).parent, []).append(one)
    many = {place: those for place, those in directories.items() if len(those) > 2}
    errors = [_no_directory(place, those) for place, those in many.items()]
    errors += [
        UserError(one.key, f"{one.path} {one.what}", one.fix)
        for one in bad
        if Path(one.path).parent not in many
    ]
    if errors:
        raise UserErrors(errors)


def _no_directory(place: Path, missing: list[BadPath]) -> UserError:
    """One error for several files of a directory that does not exist."""
    names = [Path(one.path).name for one in missing]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    what = f"{place} does not exist, of which the recipe names {', '.join(names[:3])}{more}"
    return UserError(missing[0].key, what, missing[0].fix)


def _absent(path: Path, key: str) -> str:
    """What to do about a path that is not there. A model of the Hub is named ``ORG/NAME``, which a
    recipe takes for a path beside it."""
    hub = f"{path.parent.name}/{path.name}"
    if key.startswith("domains.") or path.parent.exists() or not path.parent.parent.exists():
        return "correct the path"
    return (
        f"correct the path; if {hub} is a model on the Hugging Face Hub, download it first: "
        f"hf download {hub} --local-dir {path}"
    )
