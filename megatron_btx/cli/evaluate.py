"""``btx evaluate``: any checkpoint, outside any run. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import command
from megatron_btx.data.documents import find_files
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec, task_files
from megatron_btx.evaluate.model_spec import Subject
from megatron_btx.files import check_file, check_not_read, find_json, json_text, write_json
from megatron_btx.pipeline import eval_ranks
from megatron_btx.report.table import data_table, tasks_table

CHECKPOINT = """a CHECKPOINT is
  DIR                 a step_XXXXXXXX directory, a stage's directory of a run, or a Hugging Face
                      model's (config.json, safetensors)
  btm:DIR,DIR,...     an ensemble of these models, weighted by the posterior of their domains
  btm:RUN_DIR         the ensemble of experts and seed of a run, as its recipe defines it
  set.yaml            a set of models and how they are combined (docs/evaluate.md)
optionally preceded by NAME=."""
"""What may be given where a checkpoint is evaluated."""

_EPILOG = f"""examples:
  btx evaluate runs/demo/finetune runs/demo/seed --data code=code.jsonl math=math.jsonl
  btx evaluate btx=runs/demo/export/hf top2=btm:runs/demo --data web=web.jsonl,more/ --json
  btx evaluate runs/demo/finetune --tasks arc_easy=test.jsonl gsm8k=test.jsonl,shots=train.jsonl
  btx evaluate HF_DIR --tasks humaneval=humaneval.jsonl --allow-code-execution
  btx evaluate HF_DIR --data web=web.jsonl --layout data_parallel_size=2
  btx evaluate runs/demo/finetune --experts code,seed --data code=code.jsonl

{CHECKPOINT}

exit codes: 0 done, 1 a crash, 2 a mistake in the input, 130 interrupted"""


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` to the command line."""
    parser = command(
        commands, "evaluate", "loss on any text, and scores on tasks, of any checkpoints", _EPILOG
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs="+", help="checkpoints to evaluate"
    )
    model_flags.add_text_flags(
        parser, "NAME=FILE[,FILE]", "JSONL files and directories, and what to call them"
    )
    model_flags.add_task_flags(parser)
    model_flags.add_model_flags(parser)
    parser.add_argument(
        "--experts",
        metavar="A,B",
        help="use only these experts of an MoE",
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write everything as JSON")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx evaluate``."""
    model_flags.check_numbers(options)
    if options.out is not None:
        check_file(options.out)
    subjects = model_spec.parse(options.checkpoints)
    if options.experts is not None:
        subjects = model_spec.with_experts(subjects, options.experts)
    if not options.data and not options.tasks:
        raise UserError("btx evaluate", "neither --data nor --tasks", "give at least one of them")
    data, tasks = model_flags.data_of(options.data), model_flags.tasks_of(options)
    if options.out is not None and options.out.exists():
        check_not_read(options.out, _files_of_text(data, tasks) + _files_of_sets(options, subjects))
        if not _is_result(options.out):
            check_not_read(options.out, _files_of_models(options, subjects))
    layout = model_flags.layout_of(options.layout)
    result: dict[str, Any] = {
        "checkpoints": {one.name: {k: str(v) for k, v in one.models.items()} for one in subjects}
    }
    if options.experts is not None:
        result["experts"] = list(subjects[0].experts)
    if data:
        setting = model_flags.setting_of(options) | {"tokens": options.tokens}
        asked = eval_ranks.request_of("data", subjects, layout, data=data, setting=setting)
        result["data"] = eval_ranks.answer(asked)
    if tasks:
        asked = eval_ranks.request_of(
            "tasks", subjects, layout, tasks=tasks, predictor=model_flags.predictor_of(options)
        )
        result["tasks"] = eval_ranks.answer(asked)
    if result.get("data", result.get("tasks")) is None:  # a rank that is not the first
        return 0
    try:
        if options.out is not None:
            write_json(options.out, result)
    finally:  # what hours have measured is said also where it cannot be written
        _say(result, as_json=options.json)
    return 0


def _is_result(path: Path) -> bool:
    """Whether a file is what this command wrote before, and so no input: it may lie in a model's
    directory."""
    try:
        return "checkpoints" in (find_json(path) or {})
    except UserError:  # too large
        return False


def _files_of_text(data: dict[str, list[str]], tasks: list[dict[str, Any]]) -> list[Path]:
    """Text, tasks and their items: every file that is read."""
    files: list[Path] = []
    for name, paths in data.items():
        found = find_files(paths, where=f"--data {name}")
        files += [*found, *(file.with_suffix(".bin") for file in found if file.suffix == ".idx")]
    for one in tasks:
        files += map(Path, (*one["files"], *one["shots"]))
        if one["task"].endswith((".yaml", ".yml")) and Path(one["task"]).is_file():
            files += task_files.files_named(Path(one["task"]))
    return files


def _files_of_sets(options: argparse.Namespace, subjects: list[Subject]) -> list[Path]:
    """The files that describe sets of models, and the text that these name."""
    files = model_spec.set_files(options.checkpoints)
    for one in subjects:
        for name, paths in one.text.items():
            files += find_files(paths, where=f"text of {name}")
    return files


def _files_of_models(options: argparse.Namespace, subjects: list[Subject]) -> list[Path]:
    """All that lies in the models' directories, and in a tokenizer's."""
    places = [path for one in subjects for path in one.models.values()]
    places += [one.run_dir / "prepare" for one in subjects if one.run_dir is not None]
    places += [Path(options.tokenizer)] if options.tokenizer else []
    return [file for place in places for file in (place, *place.rglob("*"))]


def _say(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json_text(result, indent=1) + "\n")
        return
    if "data" in result:
        sys.stdout.write(data_table(result["data"]))
    if "tasks" in result:
        sys.stdout.write(tasks_table(result["tasks"]))
