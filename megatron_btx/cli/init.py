"""``btx init``: a recipe to begin with, an example's or one for checkpoints. Imports no torch until
it looks at a checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.files import written
from megatron_btx.recipe import check_paths
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.messages import near_key
from megatron_btx.recipe.yaml_tree import read_tree

_EPILOG = """examples:
  Experts that are there already, into a mixture; DIR is a Hugging Face or a Megatron checkpoint:
    btx init --seed llama --expert code=codellama --expert math=mathllama \\
             --data code=code.jsonl --data math=math.jsonl --data web=web.jsonl --gpus 8
  Experts that are still to be trained from the seed, each on its text:
    btx init --seed llama --expert code --expert math --data code=code/ --data math=math/
  An example of the project, and the list of them:
    btx init --example demo
    btx init --list

Then `btx plan recipe.yaml` and `btx run recipe.yaml`. The recipe is commented; change it as you
like. --data takes files, directories and Megatron pairs (docs/data.md); a name may have several."""


def add_parser(commands: Any) -> None:
    """Add ``init`` to the command line."""
    parser = command(commands, "init", "write a recipe to begin with", _EPILOG)
    parser.add_argument("--seed", metavar="DIR", type=Path, help="the model to branch from")
    parser.add_argument(
        "--expert",
        metavar="NAME[=DIR]",
        action="append",
        default=[],
        help="an expert: a checkpoint (=DIR), or to be trained",
    )
    parser.add_argument(
        "--data", metavar="NAME=FILE", action="append", default=[], help="training text of a domain"
    )
    parser.add_argument(
        "--valid",
        metavar="NAME=FILE",
        action="append",
        default=[],
        help="held-out text of a domain",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", type=Path, help="tokenizer, if the seed has none"
    )
    parser.add_argument(
        "--align-vocab",
        action="store_true",
        help="tokenizers differ by added tokens only: the run gets the largest vocabulary",
    )
    parser.add_argument("--gpus", metavar="N", type=int, default=0, help="number of GPUs (0: CPUs)")
    parser.add_argument(
        "--gpu-memory", metavar="GB", type=float, default=80.0, help="memory per GPU in GB (80)"
    )
    parser.add_argument(
        "--seq-length",
        metavar="N",
        type=int,
        help="sequence length in training (the model's, at most 4096)",
    )
    parser.add_argument("--name", help="name of the run (that of --out; of recipe.yaml: mine)")
    parser.add_argument(
        "--example", metavar="NAME", nargs="+", default=[], help="write these examples"
    )
    parser.add_argument("--list", action="store_true", help="list the examples")
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="output file (recipe.yaml); for examples the directory of examples/ (.)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx init``.

    Raises:
        UserErrors: nothing is asked for, or it cannot be written.
    """
    if options.list:
        sys.stdout.write("\n".join(example_names()) + "\n")
        return 0
    if options.seed is not None:
        return _begin(options)
    if options.example:
        return _examples(options)
    if any((options.expert, options.data)):
        raise UserError(
            "--seed", "is missing", "give the model from which the experts are branched"
        )
    if sys.stdout.isatty():
        sys.stdout.write(f"{_EPILOG}\n")
        return 0
    raise UserError("btx init", "nothing to write", "give --seed DIR or --example NAME; see --help")


def _examples(options: argparse.Namespace) -> int:
    written = write_examples(options.example, options.out or Path())
    for path in written:
        sys.stdout.write(f"{path}\n")
    recipes = [path for path in written if path.name == "recipe.yaml"]
    if recipes and check_paths.bad_paths(load_recipe(recipes[-1])):
        what = "names files that are not there yet: see the comments in it"
        sys.stdout.write(f"\n{recipes[-1]} {what}; then: btx plan {recipes[-1]}\n")
    elif recipes:
        sys.stdout.write(f"\nnext: btx plan {recipes[-1]}\n")
    return 0


def _begin(options: argparse.Namespace) -> int:
    errors = list(_out_of_range(options))
    experts: dict[str, Path | None] = {}
    for entry in options.expert:
        name, _, path = entry.partition("=")
        if not name or name in experts:
            what = f"{entry!r} is no new NAME or NAME=DIR"
            errors.append(UserError("--expert", what, "see --help"))
            continue
        experts[name] = Path(path) if path else None
    from megatron_btx.pipeline.init_recipe import Asked, begin

    out = options.out or Path("recipe.yaml")
    asked = Asked(
        out=out,
        name=options.name or ("mine" if out.stem == "recipe" else out.stem),
        seed=options.seed,
        experts=experts,
        train=_by_name("--data", options.data, errors),
        valid=_by_name("--valid", options.valid, errors),
        tokenizer=options.tokenizer,
        align_vocab=options.align_vocab,
        gpus=options.gpus,
        gpu_bytes=options.gpu_memory * 1e9,
        seq_length=options.seq_length,
    )
    begin(asked, errors)
    for name in sorted(asked.experts.keys() - asked.train.keys()):
        sys.stderr.write(
            f"warning: --expert {name} has no --data {name}=FILE: no text of its domain is in the "
            "finetuning, and none is held out to measure it\n"
        )
    sys.stdout.write(f"{out}\n\nnext: btx plan {out}\n")
    return 0


def _out_of_range(options: argparse.Namespace) -> Iterator[UserError]:
    if options.example:
        yield UserError("--example", "cannot be combined with --seed", "give one of the two")
    if options.gpus < 0 or options.gpu_memory <= 0:
        fix = "give a number of GPUs, and GB"
        yield UserError("--gpus, --gpu-memory", "are out of range", fix)
    if options.seq_length is not None and options.seq_length < 1:
        yield UserError("--seq-length", f"is {options.seq_length}", "give at least 1")


def _by_name(flag: str, entries: Sequence[str], errors: list[UserError]) -> dict[str, list[Path]]:
    """Paths by name; what is none joins ``errors``."""
    found: dict[str, list[Path]] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not name or not path:
            what, fix = f"{entry!r} is not NAME=FILE", f"{flag} code=code.jsonl"
            errors.append(UserError(flag, what, fix))
            continue
        found.setdefault(name, []).append(Path(path))
    return found


EXAMPLES = (Path(__file__).parent.parent / "examples").resolve()
_KINDS = (".yaml", ".py", ".md")
"""What is an example's own; text and runs that lie beside it are not."""


def example_names() -> list[str]:
    """The examples: a directory of recipes, or a script."""
    found = [path.name for path in EXAMPLES.iterdir() if _own_files(path)]
    return sorted([*found, *(path.stem for path in EXAMPLES.glob("*.py"))])


def write_examples(asked: Sequence[str], out: Path) -> list[Path]:
    """Copy examples, and the recipes that theirs start from, as they lie in the tree: what their
    files say of paths (``../../runs``) and commands holds there as it does here.

    Args:
        asked: of :func:`example_names`.
        out: a directory, which is made; they come to ``out/examples``, their runs to ``out/runs``.

    Returns:
        What is there now; a file that was there with this content stays as it is.

    Raises:
        UserErrors: there is no such example, or another file in its place; nothing is written.
    """
    known, errors = example_names(), []
    for name in asked:
        if name not in known:
            fix = f"use one of {', '.join(known)}{near_key(name, known)}"
            errors.append(UserError(f"--example {name}", "there is no such example", fix))
    if errors:
        raise UserErrors(errors)
    files = {path: path.read_bytes() for name in asked for path in _files(name)}
    places = {
        out / "examples" / path.relative_to(EXAMPLES): content for path, content in files.items()
    }
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
            path = (path.parent / os.path.expanduser(base.value)).resolve()
            yield path


def _own_files(directory: Path) -> list[Path]:
    if not directory.is_dir() or directory.name == "__pycache__":
        return []
    files = sorted(path for path in directory.iterdir() if path.suffix in _KINDS)
    return [path for path in files if path.is_file()]
