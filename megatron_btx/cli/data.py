"""``btx data check``: whether training and held-out text are kept apart. Imports no torch."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import command, recipe_command
from megatron_btx.files import check_directory, check_file, check_not_read, json_text, written
from megatron_btx.recipe.load import load_recipe

_EPILOG = """examples:
  btx data check recipe.yaml
  btx data check recipe.yaml --out shared.jsonl      every document that was found, a line each
  btx data check recipe.yaml --clean clean           and the rest as clean/DOMAIN.jsonl, to train on
  btx data check recipe.yaml --json

Reports training documents that are equal to a held-out document of any domain, or share a run of 13
words with one (arXiv 2005.14165, appendix C). The exit code is 1 where there are any."""


def add_parser(commands: Any) -> None:
    """Add ``data`` to the command line."""
    parser = command(commands, "data", "check a recipe's text before training", _EPILOG)
    kinds = parser.add_subparsers(metavar="COMMAND", required=True)
    check = recipe_command(kinds, "check", "find training text that is held-out text too", _EPILOG)
    check.add_argument("--out", metavar="FILE", type=Path, help="write the findings (JSON lines)")
    check.add_argument(
        "--clean", metavar="DIR", type=Path, help="write the training text without it: DOMAIN.jsonl"
    )
    check.add_argument("--json", action="store_true", help="print counts as JSON")
    check.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Search and report; 1 if anything is shared.

    Raises:
        UserError: text cannot be read.
    """
    recipe = load_recipe(options.recipe)
    if options.out is not None:
        check_file(options.out)
    if options.clean is not None:
        check_directory(options.clean)
    from megatron_btx.data.domain_text import texts_of
    from megatron_btx.data.separation import Found, check_separation, write_clean

    out_dir = Path(recipe.run_dir) / "prepare"
    results = [] if options.out is None else [options.out]
    if options.clean is not None:
        results += [options.clean / f"{name}.jsonl" for name in recipe.domains]
    texts = texts_of(recipe, out_dir).values()
    for path in results:
        read = (text.files(split) for text in texts for split in ("train", "valid"))
        check_not_read(path, itertools.chain(*read))
    tokenizer = out_dir / "tokenizer" if (out_dir / "tokenizer").is_dir() else None
    shared: set[str] = set()
    counts: Counter[tuple[str, str, str]] = Counter()
    first: dict[tuple[str, str, str], Found] = {}

    def told() -> Iterator[Found]:
        for found in check_separation(recipe, out_dir, tokenizer, _progress):
            if options.clean is not None:
                shared.add(found.document)
            key = (found.domain, found.kind, found.heldout_domain)
            counts[key] += 1
            first.setdefault(key, found)
            yield found

    with nullcontext() if options.out is None else written(options.out) as file:
        for found in told():
            if file is not None:
                file.write(json_text(asdict(found), ensure_ascii=False) + "\n")
    if options.clean is not None:
        write_clean(recipe, out_dir, tokenizer, shared, options.clean)
    rows = [
        {"domain": domain, "kind": kind, "heldout_domain": other, "documents": count,
         "first": asdict(first[domain, kind, other])}
        for (domain, kind, other), count in sorted(counts.items())
    ]  # fmt: skip
    if options.json:
        sys.stdout.write(json_text({"shared": rows}, indent=1) + "\n")
    else:
        sys.stdout.write(_text(rows, options.out))
    return 1 if rows else 0


def _text(rows: list[dict[str, Any]], out: Path | None) -> str:
    if not rows:
        return "No training document shares 13 words with held-out text.\n"
    lines = []
    for row in rows:
        what = "equal" if row["kind"] == "duplicate" else "share 13 words with"
        lines.append(
            f"{row['documents']:,} training documents of {row['domain']} {what} held-out text of "
            f"{row['heldout_domain']}, first {row['first']['document']} "
            f"({row['first']['heldout_document']})"
        )
    if out is None:
        lines.append("--out FILE writes all of them.")
    return "\n".join(lines) + "\n"


def _progress(what: str, done: float, **_: float) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{what} {done:.0%} ")
