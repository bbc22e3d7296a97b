"""Flags of the commands that run models, and what they mean. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import renamed
from megatron_btx.errors import UserError, UserErrors, shown
from megatron_btx.files import listed_paths
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.messages import flag_of, number
from megatron_btx.recipe.schema import Layout


def counted(text: str) -> int:
    """A count as recipes take it: ``4096``, ``60k``, ``1e6``."""
    value = number(text)
    if value is None or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number (4096, 60k and 1e6 are)")
    return int(value)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a model is run."""
    parser.add_argument(
        "--layout",
        metavar="KEY=N",
        nargs="+",
        default=[],
        help="parallel layout, with the keys of a recipe's `layout` (one rank)",
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="precision of the model (as stored)"
    )
    parser.add_argument(
        "--micro-batch-size",
        metavar="N",
        type=int,
        default=8,
        help="sequences per rank and forward pass (8)",
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer, if the checkpoint has none")


def add_text_flags(
    parser: argparse.ArgumentParser, metavar: str, what: str, tokens: int | None = None
) -> None:
    """Flags that say which text models are run on; ``tokens``: of each text, by default."""
    parser.add_argument(
        "--data", metavar=metavar, nargs="+", action="extend", default=[], help=what
    )
    most = f"maximum number of tokens of each text ({tokens or 'all'})"
    parser.add_argument("--tokens", metavar="N", type=counted, default=tokens, help=most)
    parser.add_argument(
        "--text-key", metavar="KEY", default="text", help="name of the text field in JSONL (text)"
    )
    parser.add_argument("--seq-length", metavar="N", type=int, help="sequence length in tokens")


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say on which tasks models are scored, and how."""
    parser.add_argument(
        "--tasks",
        metavar="TASK=FILE[,shots=FILE]",
        nargs="+",
        action="extend",
        default=[],
        help="a task (name or YAML file) and the files of its items",
    )
    parser.add_argument(
        "--num-fewshot", metavar="N", type=int, help="number of few-shot examples (each task's own)"
    )
    renamed(parser, "--shots", "--num-fewshot")
    parser.add_argument("--limit", metavar="N", type=int, help="use the first N items of each task")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the code that a model wrote, on this machine, for tasks scored by pass@1",
    )


_DIGITS = 100
"""Of a number, far more than any has: Python reads no more than some thousand."""


def layout_of(words: Sequence[str]) -> Layout:
    """``--layout``.

    Raises:
        UserErrors: unknown keys, and values that are no positive number or out of the key's range.
    """
    fields = {one.name: one for one in dataclasses.fields(Layout)}
    del fields["sequence_parallel"]
    given: dict[str, Any] = {}
    errors = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in fields:
            fix = f"use {', '.join(sorted(fields))}"
            errors.append(UserError("--layout", f"{key} is not a key of a layout", fix))
        elif not value.isdecimal() or len(value) > _DIGITS or int(value) < 1:
            errors.append(
                UserError("--layout", f"{shown(word)} is not a positive number", f"write {key}=2")
            )
        elif (wrong := fields[key].metadata["range"].problem(int(value))) is not None:
            errors.append(UserError(f"--layout {key}", *wrong))
        else:
            given[key] = int(value)
    if errors:
        raise UserErrors(errors)
    layout = Layout(**given)
    ep, etp, pp = (
        layout.expert_model_parallel_size,
        layout.etp,
        layout.pipeline_model_parallel_size,
    )
    if layout.world_size % (ep * etp * pp):
        what = (
            f"EP x ETP x PP ({ep} x {etp} x {pp}) does not divide the {layout.world_size} rank(s) "
            "(TP x PP x CP x DP)"
        )
        raise UserError("--layout expert_model_parallel_size", what, "raise data_parallel_size")
    return dataclasses.replace(
        layout, num_threads=given.get("num_threads", eval_ranks.threads(layout.world_size))
    )


_LEAST = {"micro_batch_size": 1, "seq_length": 1, "tokens": 1, "limit": 1, "num_fewshot": 0}


def check_numbers(options: argparse.Namespace) -> None:
    """That those of the flags that a command has are in range.

    Raises:
        UserErrors: all that are not.
    """
    given = {name: getattr(options, name, None) for name in _LEAST}
    errors = [
        UserError(flag_of(name), f"is {value}", f"give at least {_LEAST[name]}")
        for name, value in given.items()
        if value is not None and value < _LEAST[name]
    ]
    if errors:
        raise UserErrors(errors)


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    """How text is run through a model (``evaluate.loss_on_text.EvalSetting``)."""
    return {
        "precision": options.precision,
        "micro_batch_size": options.micro_batch_size,
        "seq_length": options.seq_length,
        "tokenizer": options.tokenizer,
        "text_key": options.text_key,
    }


def predictor_of(options: argparse.Namespace) -> dict[str, Any]:
    """What ``evaluate.predictor.Predictor`` is made with."""
    return {
        "precision": options.precision,
        "micro_batch_size": options.micro_batch_size,
        "tokenizer": options.tokenizer,
    }


def text_of(flag: str, given: str) -> str:
    """A text, or of ``-`` what the standard input holds.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        if given == "-":
            return sys.stdin.buffer.read().decode()
        given.encode()
    except UnicodeError as error:
        fix = "convert it, for example with iconv -t UTF-8"
        raise UserError(flag, "is not UTF-8", fix) from error
    return given


def data_of(words: Sequence[str]) -> dict[str, list[str]]:
    """``--data``: files by name, absolute.

    Raises:
        UserErrors: no name, no file, or a file that is not there.
    """
    found: dict[str, list[str]] = {}
    errors = []
    for word in words:
        name, equals, files = word.partition("=")
        if not equals or not name:
            fix = f"write NAME={word}"
            errors.append(UserError("--data", f"{word} has no name", fix))
            continue
        for file in listed_paths(files):
            if not file:  # it would be the current directory
                fix = f"write {name}=FILE,FILE"
                errors.append(UserError(f"--data {name}", f"{word} has an empty file name", fix))
            elif not Path(file).exists():
                errors.append(UserError(f"--data {name}", f"{file} does not exist"))
            found.setdefault(name, []).append(str(Path(file).absolute()))
    if errors:
        raise UserErrors(errors)
    return found


def tasks_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """``--tasks``: each with its items, its shots and what is allowed."""
    found: list[dict[str, Any]] = []
    errors = []
    for word in options.tasks:
        name, _, rest = word.partition("=")
        files: list[str] = []
        shots: list[str] = []
        for file in filter(None, listed_paths(rest)):
            (shots if file.startswith("shots=") else files).append(file.removeprefix("shots="))
        for file in (*files, *shots):
            if not Path(file).is_file():
                errors.append(UserError(f"--tasks {name}", f"{file} does not exist"))
        found.append(
            {
                "task": name,
                "files": [str(Path(file).absolute()) for file in files],
                "shots": [str(Path(file).absolute()) for file in shots],
                "num_fewshot": options.num_fewshot,
                "limit": options.limit,
                "allow_code": options.allow_code_execution,
            }
        )
    if errors:
        raise UserErrors(errors)
    return found
