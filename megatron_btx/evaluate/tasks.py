"""Tasks of the paper's section 4.1.3, and any other of lm-eval's form, on local items, offline."""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.evaluate.predictor import NO_PROGRESS, Predictor
from megatron_btx.evaluate.task_files import (
    check_config,
    load_task,
    task_errors,
    templates,
)

ITEMS = Path(__file__).parent / "items"
"""The tasks that come along, in lm-eval's format."""

SHOTS_SEED = 1234
"""Of the choice of examples."""

BOOTSTRAP = 1000
"""Resamples, for the standard error of a metric that has no formula."""


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
        "average": mean of the scores, each task once, as in the paper's table 2}``; ``stderr`` is
        lm-eval's of that metric (of a mean the sample standard deviation over the square root of
        the items, of others by bootstrap), ``None`` where there is none; ``cut`` counts the
        contexts that were too long for the model and lost their beginning, examples first.
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
                if name in tasks:
                    what = "is given twice"
                    raise UserError(f"--tasks {name}", what, "evaluate them one after the other")
                tasks[name] = built
            except UserError as error:
                errors.append(error)
        if errors:
            raise UserErrors(errors)
        found = {}
        for number, ((name, parts), one) in enumerate(zip(tasks.items(), asked, strict=True)):
            part = functools.partial(_part, progress, number, len(tasks))
            with templates(allow_code=one["allow_code"]):
                found[name] = _score(predictor, name, parts, one, part)
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
    given = asked["task"]
    own = given.endswith((".yaml", ".yml"))
    path = Path(given) if own else ITEMS / f"{given}.yaml"
    if not path.is_file():
        fix = f"use {', '.join(known())}, or a YAML file of lm-eval's form"
        raise UserError(f"--tasks {given}", "there is no such task", fix)
    config = load_task(path, allow_code=asked["allow_code"] or not own)
    name = str(config.get("task", path.stem))
    if config.get("unsafe_code") and not asked["allow_code"]:
        raise UserError(
            f"--tasks {name}",
            "runs code that the model writes",
            "add --allow-code-execution if this machine may run it",
        )
    if not asked["files"] and not own:
        raise UserError(f"--tasks {name}", "has no items", f"write {name}=FILE.jsonl")
    if asked["shots"] and not asked["files"]:  # its items may lie in files of another kind
        what = f"is given examples alone ({', '.join(asked['shots'])}): its items are its own"
        raise UserError(f"--tasks {name}", what, f"write {given}=ITEMS.jsonl,shots=FILE.jsonl")
    if asked["files"]:
        config |= _items(asked["files"], asked["shots"])
    if own and not asked["allow_code"]:
        check_config(path, config)
    if asked["num_fewshot"] is not None:
        config["num_fewshot"] = asked["num_fewshot"]
    config.pop("tag", None)
    with templates(allow_code=asked["allow_code"]), task_errors(name, path):
        parts = _parts(config, name)
        if not all(len(one.eval_docs) for one in parts.values()):
            raise UserError(f"--tasks {name}", "there are no items in its files", "give some")
        return name, parts


def _parts(config: dict[str, Any], name: str) -> dict[str, Any]:
    each = (config.get("metadata") or {}).get("each")
    return {name: _task(config)} if each is None else _by(each, config, name)


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
    from megatron_btx.evaluate.lm_eval_adapter import Task

    task = Task(config=dict(config))
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
    name: str,
    parts: dict[str, Any],
    asked: dict[str, Any],
    progress: Callable[[float], None],
) -> dict[str, Any]:
    from megatron_btx.evaluate.lm_eval_adapter import Harness

    harness = Harness(predictor, progress)
    found = _evaluate(harness, name, parts, asked)
    counts = {part: found["n-samples"][part]["effective"] for part in parts}
    results = {part: found["results"][part] for part in parts}
    metrics = {
        key.removesuffix(",none").replace(",", "/"): key
        for key, value in results[next(iter(parts))].items()
        if isinstance(value, int | float) and "," in key and "_stderr," not in key
    }
    one = next(iter(parts.values()))
    wanted = (one.config.metadata or {}).get("score") or next(iter(metrics), None)
    if wanted not in metrics:
        what = f"no number is called {wanted!r}; there is {', '.join(metrics) or 'none'}"
        raise UserError(f"--tasks {name}", what, "name one as metadata.score of its file")
    items = sum(counts.values())
    means = {
        metric: sum(results[part][key] * count for part, count in counts.items()) / items
        for metric, key in metrics.items()
    }
    return {
        "score": means[wanted],
        "stderr": _stderr(metrics[wanted], results, counts),
        "metric": wanted,
        "shots": one.config.num_fewshot,
        "items": items,
        "cut": harness.cut,
        "metrics": means,
    }


def _evaluate(
    harness: Any, name: str, parts: dict[str, Any], asked: dict[str, Any]
) -> dict[str, Any]:
    """lm-eval's evaluation. What it or a task raises of an item is the user's error, what the model
    raises is not."""
    from lm_eval.evaluator import evaluate

    os.environ["DISABLE_MULTIPROC"] = "1"  # of the bootstrap: a rank starts no pool of processes
    try:
        with redirect_stdout(io.StringIO()):  # the bootstrap prints
            result: dict[str, Any] = evaluate(
                harness,
                {"tasks": parts, "groups": {}, "group_map": {}},
                limit=asked["limit"],
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
                confirm_run_unsafe_code=asked["allow_code"],
            )
    except Exception as error:
        if harness.failed:
            raise
        with task_errors(name, Path(asked["task"])):
            raise error from None
    return result


def _stderr(
    metric: str, results: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]
) -> float | None:
    """lm-eval's standard error of a metric; of several parts pooled, as it pools a group's."""
    from lm_eval.api.metrics import pooled_sample_stderr

    key = "_stderr,".join(metric.rsplit(",", 1))
    found = {part: results[part].get(key) for part in counts}
    known = {part: float(value) for part, value in found.items() if isinstance(value, int | float)}
    if len(counts) == 1:
        return next(iter(known.values()), None)
    sizes = list(counts.values())
    if sum(sizes) == len(sizes) or any(counts[part] > 1 for part in found if part not in known):
        return None
    return float(pooled_sample_stderr([known.get(part, 0.0) for part in counts], sizes))
