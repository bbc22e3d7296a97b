"""Mixing offline: directories in, a directory out, in the memory that was promised."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.families.export import carried, write_hf
from megatron_btx.families.hf import open_hf, to_hf
from megatron_btx.families.tokenizer_files import tokenizer_files
from megatron_btx.mix.average import average
from megatron_btx.mix.command import Request
from megatron_btx.mix.copy import copy
from megatron_btx.mix.extend import append, drop
from megatron_btx.mix.method import averaging_of, mix_plan, router_of
from megatron_btx.mix.progress import Watch
from megatron_btx.recipe.count import parameters
from megatron_btx.recipe.schema import Mix, Routing
from megatron_btx.versions import versions
from megatron_btx.weights.directory import as_json
from megatron_btx.weights.execute import SLAB, Execution
from megatron_btx.weights.manifest import FORMAT, MANIFEST
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.write_torch_dist import write_torch_dist

LINEAGE = "mix.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Besides:
    """What goes into a Hugging Face result that no source says in its own words."""

    known: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of ``config.json``: tokens."""
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    """A tokenizer that had to be written anew."""


NOTHING = Besides()


def run(
    request: Request, out: TextIO, revision: str | None = None, besides: Besides = NOTHING
) -> Plan:
    """Do what is asked: print the plan, or write the result.

    Args:
        request: what.
        out: where to say so.
        revision: of our code, for the lineage.
        besides: more of a Hugging Face result.

    Raises:
        UserErrors: everything wrong with the request, the sources and their tensors.
    """
    models = open_sources(request)
    plan = plan_of(request, models)
    execution = _execution(request)
    if request.dry_run:
        out.write(describe(plan, request, execution) + "\n")
        return plan
    destination = Path(request.out)
    if not destination.parent.is_dir():
        raise UserError(str(destination.parent), "no such directory", "make it first")
    if destination.exists():
        raise UserError(str(destination), "exists already", "remove it, or give another name")
    with ThreadPoolExecutor(1) as pool, Watch(plan.nbytes, out) as watch:
        hashes = pool.submit(watch.hashes, models)
        execution = dataclasses.replace(execution, advance=watch.advance)

        def taken() -> dict[str, dict[str, str]]:
            watch.finished()
            return hashes.result()

        write(plan, request, models, execution, taken, revision, besides)
    out.write(f"{destination}: {watch.summary()}\n")
    return plan


def write(
    plan: Plan,
    request: Request,
    models: list[Checkpoint],
    execution: Execution,
    hashes: Callable[[], Mapping[str, Mapping[str, str]]],
    revision: str | None,
    besides: Besides = NOTHING,
) -> None:
    """The result in the format asked for, its lineage and the first source's tokenizer with it."""
    destination, shard = Path(request.out), parse_bytes(request.shard, "--shard")

    def files() -> dict[str, bytes]:
        assert models[0].path is not None
        found = tokenizer_files(models[0].path, megatron=request.format == "megatron")
        lineage = as_json(lineage_of(plan, request, models, hashes(), revision))
        return {**found, **besides.files, LINEAGE: lineage}

    if request.format == "hf":
        write_hf(
            plan,
            destination,
            known={**besides.known, **carried(models[0])},
            family=request.family or None,
            fused=request.fused,
            shard=shard,
            execution=execution,
            files=files,
        )
        return
    manifest = {
        "format": FORMAT,
        **plan.architecture.to_json(),
        "precision": _precision(plan),
        "step": 0,
        "consumed_samples": 0,
        "tokens": 0,
        "tokenizer": models[0].manifest.get("tokenizer"),
        "huggingface": carried(models[0]),
        "layout": {},
        "lineage": {"mix": plan.hash, "sources": [str(model.path) for model in models]},
        "has_optimizer": False,
    }
    write_torch_dist(
        plan,
        destination,
        shard=shard,
        execution=execution,
        files=lambda: {MANIFEST: as_json(manifest), **files()},
    )


def open_sources(request: Request) -> list[Checkpoint]:
    """Open every source; all that is wrong with any of them at once."""
    models: list[Checkpoint] = []
    errors: list[UserError] = []
    for source in request.sources:
        label, _, path = source.rpartition("=")
        try:
            label = label or Path(path).resolve().name
            models.append(open_source(Path(path), label, request.model))
        except UserErrors as found:
            errors += found.errors
        except UserError as found:
            errors.append(found)
    if errors:
        raise UserErrors(errors)
    return models


def open_source(path: Path, label: str, given: Mapping[str, Any] | None = None) -> Checkpoint:
    """A checkpoint of either format; ``given`` says what a Megatron one does not say itself."""
    if (path / ".metadata").exists():
        return open_megatron(path, label, given)
    if (path / "config.json").exists():
        return open_hf(path, label)
    patterns = ("step_????????", "checkpoints/step_????????", "iter_???????")
    steps = [step for pattern in patterns for step in sorted(path.glob(pattern))]
    fix = f"give {steps[-1]}" if steps else "give a step_XXXXXXXX or a Hugging Face directory"
    raise UserError(str(path), "not a checkpoint (no .metadata and no config.json)", fix)


def plan_of(request: Request, models: list[Checkpoint]) -> Plan:
    """The plan that a request asks for."""
    dtype = DTYPES[request.dtype] if request.dtype else _common_dtype(models)
    single = {"upcycle": 1, "drop": 1, "copy": 1, "append": 2}
    wanted = single.get(request.method)
    if wanted is not None and len(models) != wanted:
        what = f"{request.method} takes {wanted} source{'s'[: wanted - 1]}, not {len(models)}"
        raise UserError("--sources", what, "see btx mix --help")
    mix = mix_of(request)
    match request.method:
        case "average":
            averaging = averaging_of(mix, request.random_seed, request.seed_model)
            return average(models, dtype=dtype, averaging=averaging)
        case "append":
            return append(*models, dtype=dtype, router=router_of(mix, request.random_seed))
        case "drop":
            return drop(models[0], request.expert, dtype=dtype)
        case "copy":
            return copy(models[0], dtype=dtype)
    return mix_plan(
        models,
        mix=mix,
        routing=Routing(type="topk", moe_router_topk=request.moe_router_topk),
        dtype=dtype,
        random_seed=request.random_seed,
        seed_model=request.seed_model,
    )


def mix_of(request: Request) -> Mix:
    """A request's part that a recipe has too."""
    same = {one.name for one in dataclasses.fields(Mix)} & {
        one.name for one in dataclasses.fields(Request)
    }
    options: dict[str, Any] = {name: getattr(request, name) for name in same}
    if request.method in ("average", "append", "drop", "copy"):
        options["method"] = "btx"
    options["average"] = _weights(request.average)
    groups: dict[str, tuple[str, ...]] = {}
    for entry in request.average_groups:
        group, _, weight = entry.partition(":")
        groups[group] = (*groups.get(group, ()), weight)
    options["average_groups"] = {
        group: _by_name("--average-groups", entries) for group, entries in groups.items()
    }
    return Mix(**options)


def describe(plan: Plan, request: Request, execution: Execution) -> str:
    """What ``--dry-run`` prints."""
    shown = to_hf(plan, fused=request.fused) if request.format == "hf" else plan
    count = parameters(plan.architecture)
    free = shutil.disk_usage(_existing(Path(request.out))).free
    peak = _resident() + execution.workers * 8 * execution.slab
    return "\n".join(
        [
            shown.describe(),
            f"{count.total_true_vocab:,} parameters, {count.active:,} active a token",
            f"memory: about {peak / 2**30:.2f} GiB; disk: {plan.nbytes / 2**30:.2f} GiB of "
            f"{free / 2**30:.2f} GiB free",
        ]
    )


def lineage_of(
    plan: Plan,
    request: Request,
    models: list[Checkpoint],
    hashes: Mapping[str, Mapping[str, str]],
    revision: str | None,
) -> dict[str, Any]:
    """``mix.json``: enough to make the result again and to recognise it."""
    digest = None
    asked = {
        one.name: getattr(request, one.name)
        for one in dataclasses.fields(request)
        if one.name not in ("out", "memory", "workers", "dry_run")
    }
    if request.centroids is not None:
        path = Path(request.centroids).resolve()
        asked["centroids"] = str(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {
        "plan": plan.hash,
        "request": asked,
        "sources": [
            {
                "name": m.label,
                "path": str(m.path and m.path.resolve()),
                "sha256": hashes[m.label],
                "tokens": m.manifest.get("tokens"),
                **m.architecture.to_json(),
            }
            for m in models
        ],
        "centroids_sha256": digest,
        "architecture": plan.architecture.to_json(),
        "dtype": _precision(plan),
        "versions": versions(),
        "code": revision,
    }


def _precision(plan: Plan) -> str:
    """The recipe's word for the dtype of a result."""
    (dtype,) = {target.dtype for target in plan.targets.values()}
    return {value: name for name, value in DTYPES.items()}[dtype]


def _execution(request: Request) -> Execution:
    """Slabs and workers that keep a promise of memory.

    Besides what the process holds already, a worker holds a slab of the result, what it is made of
    (mapped pages count) and an fp64 accumulator: eight slabs are more than that.
    """
    workers = max(1, request.workers)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    if not request.memory:
        return Execution(workers=workers)
    limit = parse_bytes(request.memory)
    left = limit - _resident() - (64 << 20)
    slab = min(SLAB, left // (8 * workers))
    if slab < 1 << 20:
        workers, slab = 1, min(SLAB, left // 8)
    if slab < 1 << 19:
        least = (_resident() + (64 << 20) + 8 * (1 << 19)) / 2**20
        raise UserError("--memory", f"{request.memory} is too little", f"give {least:.0f}MiB")
    return Execution(slab=slab, workers=workers)


def parse_bytes(text: str, where: str = "--memory") -> int:
    """``2GiB``, ``500MB``, ``1e9`` in bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    try:
        if match is None:
            return int(float(text))
        power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    except ValueError:
        raise UserError(where, f"{text!r} is no size", "write 2GiB or 500MiB") from None


def _resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _weights(given: tuple[str, ...]) -> Literal["uniform", "tokens"] | dict[str, float]:
    if given in ((), ("uniform",)):
        return "uniform"
    return "tokens" if given == ("tokens",) else _by_name("--average", given)


def _by_name(flag: str, given: tuple[str, ...]) -> dict[str, float]:
    try:
        pairs = [entry.rsplit("=", 1) for entry in given]
        return {name: float(weight) for name, weight in pairs}
    except ValueError:
        what = f"{' '.join(given)} is not NAME=WEIGHT ..."
        raise UserError(flag, what, "write code=2 math=1") from None


def _common_dtype(models: list[Checkpoint]) -> torch.dtype:
    dtypes = {dtype for model in models for _, dtype in model.source.tensors.values()}
    if len(dtypes) != 1:
        what = f"the sources have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
        raise UserError("--dtype", what, "say which the result shall have")
    return dtypes.pop()


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path
