"""``btx routing``: where the router of runs and checkpoints sends which text. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import add_format_flag, command
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.files import json_text, written
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.messages import flag_of
from megatron_btx.recipe.schema import WandB
from megatron_btx.report import figure_files, token_routing
from megatron_btx.report.routing import RoutingView, log, of_run, page, table

_EPILOG = """examples:
  btx routing runs/demo                          before and after its finetuning
  btx routing runs/demo runs/demo-no-balance     with and without the balance loss, side by side
  btx routing runs/demo/finetune HF_MIXTRAL --data code=code.jsonl web=web.jsonl
  btx routing runs/demo/finetune                 its last checkpoint, on the run's held-out text
  btx routing runs/demo --out routing.svg        a figure for a paper; .png and .csv likewise
  btx routing runs/demo --out routing --format csv --wandb offline
  btx routing runs/demo/finetune --text "def area(radius):" --out routing    token by token

A run has measured its routing on its own held-out text while it trained: nothing is computed. A
checkpoint (a step or stage directory, a Hugging Face model) is measured on --data, one of a run
without --data on the run's held-out text. With --text it is measured token by token."""


def add_parser(commands: Any) -> None:
    """Add ``routing`` to the command line."""
    parser = command(
        commands,
        "routing",
        "show how the router distributes text: shares, gates, dead experts",
        _EPILOG,
        "Show how the router of runs and checkpoints distributes text over experts.",
    )
    parser.add_argument(
        "sources", metavar="RUN_DIR|CHECKPOINT", nargs="+", help="runs, or models with experts"
    )
    model_flags.add_text_flags(parser, "NAME=FILE[,FILE]", "text to measure checkpoints on")
    parser.add_argument(
        "--text",
        metavar="TEXT",
        action="append",
        default=[],
        help="show the experts of each token of a text (may be repeated); -: standard input",
    )
    model_flags.add_model_flags(parser)
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=Path,
        help="a directory for routing.json and .html, or a file: routing.svg, .png or .csv",
    )
    add_format_flag(parser, "the heatmaps")
    parser.add_argument(
        "--wandb", choices=["offline", "online"], help="log table and page to Weights & Biases"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    model_flags.check_numbers(options)
    if options.text:
        return _by_token(options)
    formats = figure_files.check_formats(options.format, options.out)
    runs = [Path(source) for source in options.sources if _is_run(Path(source))]
    others = [source for source in options.sources if not _is_run(Path(source))]
    subjects = model_spec.parse(others)
    if not subjects:
        _refuse_of_runs(options)
    of_no_run = [one.name for one in subjects if model_spec.run_of(one.first) is None]
    if of_no_run and not options.data:
        what = "lies in no run's directory, so there is no held-out text to measure it on"
        raise UserError(of_no_run[0], what, "give text to measure it on: --data NAME=FILE")
    views = [view for run_dir in runs for view in of_run(run_dir)]
    if subjects:
        views += _measured(subjects, options)
    if not views:  # a rank that is not the first
        return 0
    text = json_text([view.as_json() for view in views]) + "\n"
    directory = None if figure_files.suffix(options.out) else options.out
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (("routing.json", text), ("routing.html", page(views))):
            with written(directory / name) as file:
                file.write(content)
    if formats:
        made = figure_files.save_all(
            [figure_files.of_routing(views)], formats, options.out or Path()
        )
        sys.stderr.write("".join(f"figure: {path}\n" for path in made))
    sys.stdout.write(text if options.json else "\n".join(map(table, views)))
    if directory is not None and not options.json:
        sys.stdout.write(f"page: {directory / 'routing.html'}\n")
    if options.wandb is not None:
        log(views, options.wandb, directory or Path(), wandb_of(runs, subjects))
    return 0


def wandb_of(runs: list[Path], subjects: list[Subject]) -> WandB:
    """Project and entity: of the first run that is shown, or that a model is of."""
    of_models = [run_dir for one in subjects if (run_dir := model_spec.run_of(one.first))]
    found = [*runs, *of_models]
    return load_recipe(found[0] / "recipe.yaml").wandb if found else WandB()


_COMPUTING = ("data", "tokens", "text_key", "seq_length", "layout", "precision",
              "micro_batch_size", "tokenizer")  # fmt: skip
"""Flags that say how a checkpoint is measured."""


def _refuse_of_runs(options: argparse.Namespace) -> None:
    """Where nothing but runs is shown, which have measured their routing: flags that say how."""
    for name in _COMPUTING:
        if getattr(options, name) != options.parser.get_default(name):
            what = "is about a measurement, and a run has made its own while it trained"
            fix = f"leave it out, or give a checkpoint: {Path(options.sources[0]) / 'finetune'}"
            raise UserError(flag_of(name), what, fix)


def _by_token(options: argparse.Namespace) -> int:
    """``--text``."""
    figure_files.check_formats(options.format, options.out)
    given = {
        "--data": options.data,
        "--format": options.format,
        f"--out {options.out}": figure_files.suffix(options.out),
        "--wandb": options.wandb,
        "--tokens": options.tokens,
        "--seq-length": options.seq_length,
    }
    if other := [flag for flag, value in given.items() if value]:
        raise UserError(other[0], "does not go with --text", "leave one of them out")
    if len(options.sources) > 1:
        raise UserError(options.sources[1], "--text looks at one model", "give one")
    (subject,) = model_spec.parse(options.sources)
    if subject.method is not None:
        raise UserError(subject.name, "is a set of models: it has no router", "give one model")
    texts = [model_flags.text_of("--text", text) for text in options.text]
    asked = eval_ranks.request_of(
        "token_routing",
        [subject],
        model_flags.layout_of(options.layout),
        texts=texts,
        predictor=model_flags.predictor_of(options),
    )
    found = eval_ranks.answer(asked)
    if found is None:  # a rank that is not the first
        return 0
    _show_tokens(subject.name, found, options)
    return 0


def _show_tokens(name: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    text = json_text(found) + "\n"
    for number, one in enumerate(found["texts"], 1):
        if one["cut"]:
            what = f"its last {one['cut']} tokens are left out: the model's context is full"
            sys.stderr.write(f"hint: text {number}: {what}\n")
    sys.stdout.write(text if options.json else "\n".join(map(token_routing.table, found["texts"])))
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    whole = token_routing.page(name, found)
    for file_name, content in (("token_routing.json", text), ("token_routing.html", whole)):
        with written(options.out / file_name) as file:
            file.write(content)
    if not options.json:
        sys.stdout.write(f"page: {options.out / 'token_routing.html'}\n")


def _is_run(path: Path) -> bool:
    return (path / "recipe.yaml").is_file()


def _measured(subjects: list[Subject], options: argparse.Namespace) -> list[RoutingView]:
    sets = [one.name for one in subjects if one.method is not None]
    if sets:
        raise UserError(sets[0], "is a set of models: it has no router", "give one model")
    asked = eval_ranks.request_of(
        "routing",
        subjects,
        model_flags.layout_of(options.layout),
        data=model_flags.data_of(options.data),
        setting=model_flags.setting_of(options) | {"tokens": options.tokens},
    )
    found = eval_ranks.answer(asked) or {}
    return [
        RoutingView(name=name, moment="as it is", balance_loss_coeff=None, **one)
        for name, one in found.items()
    ]
