"""``btx evaluate`` and ``btx generate``: any checkpoint, outside any run. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.evaluate import model_spec
from megatron_btx.evaluate.sample_top1_mode import in_words
from megatron_btx.files import check_file, write_json
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.schema import Layout

_CHECKPOINT = """a CHECKPOINT is
  DIR                 a step_XXXXXXXX directory, a stage's directory of a run, or a Hugging Face
                      model's (config.json, safetensors)
  btm:DIR,DIR,...     these models, averaged by the posterior of their domains
  btm:RUN_DIR         experts and seed of a run, averaged as its recipe says
  set.yaml            a set of models and how they are averaged (docs/evaluate.md)
and NAME= may stand before it."""

_EVALUATE = f"""examples:
  btx evaluate runs/demo/finetune runs/demo/seed --data code=code.jsonl math=math.jsonl
  btx evaluate btx=runs/demo/export/hf top2=btm:runs/demo --data web=web.jsonl,more/ --json
  btx evaluate runs/demo/finetune --tasks arc_easy=test.jsonl gsm8k=test.jsonl,shots=train.jsonl
  btx evaluate HF_DIR --tasks humaneval=humaneval.jsonl --allow-code-execution
  btx evaluate HF_DIR --data web=web.jsonl --layout data_parallel_size=2

{_CHECKPOINT}

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted"""

_GENERATE = f"""examples:
  btx generate runs/demo/finetune --prompt "def area(radius):"
  btx generate btm:runs/demo --prompt "Q: 3 + 4 = " --max-new-tokens 8 --until ";"
  btx generate HF_DIR --temperature 0.8 --top-p 0.95 --random-seed 3 --prompt "Once" --prompt "In"
  echo "Once upon" | btx generate HF_DIR --prompt - --json

{_CHECKPOINT}"""


def add_parsers(commands: Any) -> None:
    """Add ``evaluate`` and ``generate`` to the command line."""
    parser = _command(
        commands, "evaluate", "loss on any text, and scores on tasks, of any checkpoints", _EVALUATE
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+", help="what to evaluate")
    parser.add_argument(
        "--data",
        metavar="NAME=FILE[,FILE]",
        nargs="+",
        action="extend",
        default=[],
        help="JSONL files and directories, and what to call them",
    )
    add_tasks(parser)
    add_how(parser)
    parser.add_argument("--tokens", metavar="N", type=int, help="of each text, at most (all)")
    parser.add_argument("--text-key", metavar="KEY", default="text", help="of the JSONL (text)")
    parser.add_argument("--seq-length", metavar="N", type=int, help="tokens of a sequence")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write everything as JSON")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, no table")
    parser.set_defaults(run=run_evaluate)

    parser = _command(commands, "generate", "continue prompts with any checkpoint", _GENERATE)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model, or a BTM set")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="may be repeated; - is stdin"
    )
    add_how(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=64, help="at most (64)")
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0, help="of the draw (1)")
    parser.add_argument("--random-seed", metavar="N", type=int, default=0, help="of the draw (0)")
    parser.add_argument(
        "--until", metavar="TEXT", action="append", default=[], help="ends a continuation"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_generate)


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Flags that say on which tasks models are scored, and how."""
    parser.add_argument(
        "--tasks",
        metavar="TASK=FILE[,shots=FILE]",
        nargs="+",
        action="extend",
        default=[],
        help="a task by its name or its YAML, and its items",
    )
    parser.add_argument("--shots", metavar="N", type=int, help="instead of each task's own number")
    parser.add_argument("--limit", metavar="N", type=int, help="the first N items of each task")
    parser.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the code that a model wrote, on this machine, for tasks scored by pass@1",
    )


def _command(commands: Any, name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_how(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a model is run."""
    parser.add_argument(
        "--layout",
        metavar="KEY=N",
        nargs="+",
        default=[],
        help="how ranks divide the model, in a recipe's words (one rank)",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="(as stored)")
    parser.add_argument(
        "--micro-batch-size", metavar="N", type=int, default=8, help="sequences a rank runs (8)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="where the checkpoint has none")


def layout_of(words: Sequence[str]) -> Layout:
    """``--layout``.

    Raises:
        UserErrors: unknown keys and values that are no positive number.
    """
    fields = {one.name for one in dataclasses.fields(Layout)} - {"sequence_parallel"}
    given: dict[str, Any] = {}
    errors = []
    for word in words:
        key, _, value = word.partition("=")
        if key not in fields:
            fix = f"use {', '.join(sorted(fields))}"
            errors.append(UserError("--layout", f"{key} is no key of it", fix))
        elif not value.isdecimal() or int(value) < 1:
            errors.append(UserError("--layout", f"{word} is no number", f"write {key}=2"))
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


_LEAST = {"micro_batch_size": 1, "seq_length": 1, "tokens": 1, "limit": 1, "shots": 0}


def check_numbers(options: argparse.Namespace) -> None:
    """That those of the flags that a command has are in range.

    Raises:
        UserErrors: all that are not.
    """
    given = {name: getattr(options, name, None) for name in _LEAST}
    errors = [
        UserError("--" + name.replace("_", "-"), f"is {value}", f"give at least {_LEAST[name]}")
        for name, value in given.items()
        if value is not None and value < _LEAST[name]
    ]
    if errors:
        raise UserErrors(errors)


def run_evaluate(options: argparse.Namespace) -> int:
    """``btx evaluate``."""
    check_numbers(options)
    if options.out is not None:
        check_file(options.out)
    subjects = model_spec.parse(options.checkpoints)
    if not options.data and not options.tasks:
        raise UserError("btx evaluate", "neither --data nor --tasks", "say what to evaluate on")
    data, tasks = data_of(options.data), tasks_of(options)
    layout = layout_of(options.layout)
    result: dict[str, Any] = {
        "checkpoints": {one.name: {k: str(v) for k, v in one.models.items()} for one in subjects}
    }
    try:
        if data:
            setting = setting_of(options) | {"tokens": options.tokens}
            asked = eval_ranks.request_of("data", subjects, layout, data=data, setting=setting)
            result["data"] = eval_ranks.answer(asked)
        if tasks:
            asked = eval_ranks.request_of(
                "tasks", subjects, layout, tasks=tasks, predictor=predictor_of(options)
            )
            result["tasks"] = eval_ranks.answer(asked)
    except eval_ranks.Ended as ended:
        return ended.code
    if result.get("data", result.get("tasks")) is None:  # a rank that is not the first
        return 0
    if options.out is not None:
        write_json(options.out, result)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return 0
    if data:
        sys.stdout.write(data_table(result["data"]))
    if tasks:
        sys.stdout.write(tasks_table(result["tasks"]))
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """``btx generate``."""
    check_numbers(options)
    subjects = model_spec.parse([options.checkpoint])
    if not options.prompt:
        raise UserError("--prompt", "is missing", "give the text to continue")
    for flag, good in (
        ("max_new_tokens", options.max_new_tokens >= 1),
        ("temperature", options.temperature >= 0),
        ("top_p", 0 < options.top_p <= 1),
        ("random_seed", 0 <= options.random_seed < 2**31),
    ):
        if not good:
            what = f"{getattr(options, flag)} is out of range"
            raise UserError("--" + flag.replace("_", "-"), what, "see btx generate --help")
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in options.prompt]
    decoding = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "random_seed": options.random_seed,
        "until": options.until,
    }
    asked = eval_ranks.request_of(
        "generate",
        subjects,
        layout_of(options.layout),
        prompts=prompts,
        decoding=decoding,
        predictor=predictor_of(options),
    )
    try:
        found = eval_ranks.answer(asked)
    except eval_ranks.Ended as ended:
        return ended.code
    if found is None:
        return 0
    if options.json:
        rows = [{"prompt": prompt} | one for prompt, one in zip(prompts, found, strict=True)]
        sys.stdout.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        return 0
    for number, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        sys.stdout.write(("\n" if number else "") + prompt + one["text"] + "\n")
    return 0


def setting_of(options: argparse.Namespace) -> dict[str, Any]:
    """How text is run through a model (``evaluate.data.Setting``)."""
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


def data_of(words: Sequence[str]) -> dict[str, list[str]]:
    """``--data``: files by name, absolute.

    Raises:
        UserErrors: no name, or a file that is not there.
    """
    found: dict[str, list[str]] = {}
    errors = []
    for word in words:
        name, equals, files = word.partition("=")
        if not equals or not name:
            fix = f"write NAME={word}"
            errors.append(UserError("--data", f"{word} has no name before it", fix))
            continue
        for file in files.split(","):
            if not Path(file).exists():
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
        for file in filter(None, rest.split(",")):
            (shots if file.startswith("shots=") else files).append(file.removeprefix("shots="))
        for file in (*files, *shots):
            if not Path(file).is_file():
                errors.append(UserError(f"--tasks {name}", f"{file} does not exist"))
        found.append(
            {
                "task": name,
                "files": [str(Path(file).absolute()) for file in files],
                "shots": [str(Path(file).absolute()) for file in shots],
                "num_fewshot": options.shots,
                "limit": options.limit,
                "allow_code": options.allow_code_execution,
            }
        )
    if errors:
        raise UserErrors(errors)
    return found


def data_table(result: Mapping[str, Any]) -> str:
    """Nats per token, then bits per byte."""
    names = list(next(iter(result.values()))["data"])
    parts = []
    for key, title in (("nats_per_token", "nats/token"), ("bits_per_byte", "bits/byte")):
        rows = []
        for checkpoint, found in result.items():
            values = [found["data"][name][key] for name in names]
            rows.append([checkpoint, *(f"{v:.4f}" for v in (*values, sum(values) / len(values)))])
        parts.append(columns([title, *names, "mean"], rows))
    sets = {name: found["weights"] for name, found in result.items() if "weights" in found}
    for checkpoint, weights in sets.items():
        models = list(next(iter(weights.values())))
        rows = [[n, *(f"{weights[n][m]:.0%}" for m in models)] for n in names]
        parts.append(columns([f"{checkpoint}: weights", *models], rows))
    return "\n".join(parts) + _choices(result)


def _choices(result: Mapping[str, Any]) -> str:
    """How each checkpoint of Sample Top-1 was evaluated."""
    chosen = {name: found["expert_choice"] for name, found in result.items()
              if "expert_choice" in found}  # fmt: skip
    return "".join(f"{name}: {in_words(choice)}\n" for name, choice in chosen.items())


def tasks_table(result: Mapping[str, Any]) -> str:
    """A row a checkpoint, a column a task, and their mean, as in the paper's tables."""
    names = list(next(iter(result.values()))["tasks"])
    rows = []
    for checkpoint, found in result.items():
        scores = [found["tasks"][name] for name in names]
        cells = [f"{100 * one['score']:.1f} ±{100 * one['stderr']:.1f}" for one in scores]
        rows.append([checkpoint, *cells, f"{100 * found['average']:.1f}"])
    one = next(iter(result.values()))["tasks"]
    said = "; ".join(
        f"{name}: {one[name]['metric']}, {one[name]['shots']} shots, {one[name]['items']} items"
        for name in names
    )
    text = columns(["score (%)", *names, "average"], rows) + said + "\n"
    for checkpoint, found in result.items():
        for name, entry in found["tasks"].items():
            if entry["cut"]:
                text += (
                    f"{checkpoint}, {name}: {entry['cut']} contexts were longer than the model's "
                    "and lost their beginning\n"
                )
    return text + _choices(result)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"
