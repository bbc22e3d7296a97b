"""Tasks of the paper's section 4.1.3, and any other of lm-eval's form, on local items, offline."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.evaluate.predictor import NO_PROGRESS, Predictor

ITEMS = Path(__file__).parent / "items"
"""The tasks that come along, in lm-eval's format."""

SHOTS_SEED = 1234
"""Of the choice of examples."""


def known() -> list[str]:
    """Names of the tasks that come along."""
    return sorted(path.stem for path in ITEMS.glob("*.yaml"))


def evaluate_tasks(
    predictor: Predictor,
    asked: Sequence[dict[str, Any]],
    progress: Callable[[float], None] = NO_PROGRESS,
) -> dict[str, Any]:
    """Score a model on tasks. Every rank calls it.

    Args:
        predictor: the model.
        asked: of each task its name (of :func:`known`) or YAML file as ``task``; ``files`` with its
            items and ``shots`` with examples (without them, other items of the same file);
            ``num_fewshot`` and ``limit`` (``None``: the task's own, all); ``allow_code``.
        progress: told how much of each kind of request is done.

    Returns:
        ``{"tasks": {name: {"score", "stderr", "metric", "shots", "items", "cut", "metrics": all}},
        "average": mean of the scores, each task once, as in the paper's table 2}``; ``cut`` counts
        the contexts that were too long for the model and lost their beginning, examples first.
        Of Sample Top-1 also its ``expert_choice``.

    Raises:
        UserErrors: no lm-eval, unknown tasks, items that do not fit, code that may not be run.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks", "lm-eval is not installed", "pip install 'megatron-btx[eval]'")
    with tempfile.TemporaryDirectory(prefix="btx-items-") as cache:
        # Read when `datasets` is first imported: nothing is asked of the network, and what it makes
        # of the items is gone with this process.
        os.environ["HF_DATASETS_CACHE"] = cache
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            os.environ[name] = "1"
        _quiet()
        errors: list[UserError] = []
        tasks: dict[str, dict[str, Any]] = {}
        for one in asked:
            try:
                name, built = _build(one)
                tasks[name] = built
            except UserError as error:
                errors.append(error)
        if errors:
            raise UserErrors(errors)
        found = {}
        for number, ((name, parts), one) in enumerate(zip(tasks.items(), asked, strict=True)):
            part = functools.partial(_part, progress, number, len(tasks))
            found[name] = _score(predictor, parts, one, part)
    average = sum(one["score"] for one in found.values()) / len(found)
    result = {"tasks": found, "average": average}
    if predictor.expert_choice is not None:
        result["expert_choice"] = predictor.expert_choice
    return result


def _part(progress: Callable[[float], None], number: int, many: int, share: float) -> None:
    """A task's progress as that of all."""
    progress((number + share) / many)


def _quiet() -> None:
    import datasets

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _build(asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A task's name and its parts: one, or one a subject."""
    from lm_eval.tasks._yaml_loader import load_yaml

    given = asked["task"]
    own = given.endswith((".yaml", ".yml"))
    path = Path(given) if own else ITEMS / f"{given}.yaml"
    if not path.is_file():
        fix = f"use {', '.join(known())}, or a YAML file of lm-eval's form"
        raise UserError(f"--tasks {given}", "there is no such task", fix)
    try:
        config = load_yaml(path)
    except Exception as error:  # what a user's file may raise
        raise UserError(str(path), f"is no task: {error}", "see lm-eval's task guide") from error
    name = str(config.get("task", path.stem))
    if config.get("unsafe_code") and not asked["allow_code"]:
        raise UserError(
            f"--tasks {name}",
            "runs code that the model writes",
            "add --allow-code-execution if this machine may run it",
        )
    if not asked["files"] and not own:
        raise UserError(f"--tasks {name}", "has no items", f"write {name}=FILE.jsonl")
    if asked["files"]:
        config |= _items(asked["files"], asked["shots"])
    if asked["num_fewshot"] is not None:
        config["num_fewshot"] = asked["num_fewshot"]
    config.pop("tag", None)
    each = (config.get("metadata") or {}).get("each")
    try:
        if each is None:
            return name, {name: _task(config)}
        return name, _by(each, config, name)
    except UserError:
        raise
    except Exception as error:  # jinja's, pyarrow's, lm-eval's own
        raise UserError(
            f"--tasks {name}",
            f"its items do not fit: {type(error).__name__}: {str(error).splitlines()[0][:200]}",
            f"look at {path} for the keys that it needs",
        ) from error


def _items(files: Sequence[str], shots: Sequence[str]) -> dict[str, Any]:
    """Where a task's items are, in lm-eval's words."""
    parts = {"test": list(files)} | ({"shots": list(shots)} if shots else {})
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": parts},
        "test_split": "test",
        "validation_split": None,
        "training_split": None,
        "fewshot_split": "shots" if shots else "test",
    }


def _task(config: dict[str, Any]) -> Any:
    from lm_eval.api.task import ConfigurableTask

    task = ConfigurableTask(config=dict(config))
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SHOTS_SEED)
    return task


def _by(key: str, config: dict[str, Any], name: str) -> dict[str, Any]:
    """A task for each value of a key, so that examples are of the item's own kind."""
    whole = _task(config | {"num_fewshot": 0})
    docs = whole.test_docs()
    if key not in docs.column_names:
        return {name: _task(config)}

    def only(value: str) -> Callable[[Any], Any]:
        return lambda docs: docs.select([i for i, v in enumerate(docs[key]) if v == value])

    return {
        f"{name}_{value}": _task(config | {"process_docs": only(value), "task": f"{name}_{value}"})
        for value in dict.fromkeys(docs[key])
    }


def _score(
    predictor: Predictor,
    parts: dict[str, Any],
    asked: dict[str, Any],
    progress: Callable[[float], None],
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    from megatron_btx.evaluate.lm_eval_adapter import Harness

    harness = Harness(predictor, progress)
    found = evaluate(
        harness,
        {"tasks": parts, "groups": {}, "group_map": {}},
        limit=asked["limit"],
        log_samples=False,
        bootstrap_iters=0,
        confirm_run_unsafe_code=asked["allow_code"],
    )
    counts = {part: found["n-samples"][part]["effective"] for part in parts}
    items = sum(counts.values())
    totals: dict[str, float] = {}
    for part, count in counts.items():
        for key, value in found["results"][part].items():
            if isinstance(value, (int, float)) and "," in key and "stderr" not in key:
                metric = key.removesuffix(",none").replace(",", "/")
                totals[metric] = totals.get(metric, 0.0) + value * count
    metrics = {metric: total / items for metric, total in totals.items()}
    one = next(iter(parts.values()))
    wanted = (one.config.metadata or {}).get("score") or next(iter(metrics))
    score = metrics[wanted]
    return {
        "score": score,
        "stderr": (max(score * (1 - score), 0.0) / items) ** 0.5,
        "metric": wanted,
        "shots": one.config.num_fewshot,
        "items": items,
        "cut": harness.cut,
        "metrics": metrics,
    }
