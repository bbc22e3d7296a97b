"""Mixing offline: directories in, a directory out, within a limit of memory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.families.export import carried, write_hf
from megatron_btx.families.hf import family_of, to_hf, wanted
from megatron_btx.families.llama_cpp import unlike
from megatron_btx.families.megatron_bridge import RUN_CONFIG, run_config
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.families.tokenizer_files import (
    described_whole,
    place_of,
    token_ids,
    tokenizer_files,
)
from megatron_btx.files import no_directory
from megatron_btx.mix import mergekit_config
from megatron_btx.mix.card import mix_card
from megatron_btx.mix.compatibility import speaker_of, tokenizer_words
from megatron_btx.mix.mergekit_config import Gates
from megatron_btx.mix.plans import DTYPES, as_flag, misfits, open_sources, plan_of
from megatron_btx.mix.request import MixRequest
from megatron_btx.mix.source_files import MixProgress
from megatron_btx.provenance import versions
from megatron_btx.recipe.count import parameters
from megatron_btx.recipe.fields import out_of_range
from megatron_btx.weights.claimed_directory import Partial
from megatron_btx.weights.directory import as_json
from megatron_btx.weights.execute import ONE_BY_ONE, SLAB, Execution
from megatron_btx.weights.manifest import FORMAT, MANIFEST
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import MemorySource

LINEAGE = "mix.json"


def run(
    request: MixRequest,
    out: TextIO,
    revision: str | None = None,
    gates: Gates | None = None,
) -> Plan:
    """Do what is asked: print the plan, or write the result.

    Args:
        request: what.
        out: where to say so.
        revision: of our code, for the lineage.
        gates: how a file of mergekit's has the routers begin; ``None``: as the request says.

    Raises:
        UserErrors: everything wrong with the request, the sources and their tensors.
    """
    request, models, plan, execution = _prepared(request)
    if gates is not None:
        request, plan = _with_gates(request, models, gates)
    if request.dry_run:
        out.write(describe(plan, request, models, execution) + "\n")
        return plan
    destination = Path(request.out)
    with (
        goes_on(destination),
        ThreadPoolExecutor(1) as pool,
        MixProgress(plan.nbytes, out) as watch,
    ):
        hashes = pool.submit(watch.hashes, models)
        execution = dataclasses.replace(execution, advance=watch.advance)

        def taken() -> dict[str, dict[str, str]]:
            watch.finished()
            return hashes.result()

        write(plan, request, models, execution, taken, revision)
    for line in _words(plan, request, models):
        out.write(line + "\n")
    out.write(f"{destination}: {watch.summary()}\n")
    return plan


@contextlib.contextmanager
def goes_on(out: Path) -> Iterator[None]:
    """Say so where Ctrl-C has ended the block that makes ``out``, and files of it are left."""
    try:
        yield
    except KeyboardInterrupt:
        if Partial.of(out).path.is_dir():
            sys.stderr.write("interrupted: the same command goes on from the finished files\n")
        raise


def _prepared(request: MixRequest) -> tuple[MixRequest, list[Checkpoint], Plan, Execution]:
    """The whole request, sources, plan and execution; whatever is wrong with any of them, and with
    where the result shall lie, is told at once."""
    errors: list[UserError] = []
    destination = Path(request.out)
    if not request.dry_run and os.path.lexists(destination):
        errors.append(
            UserError(str(destination), "exists already", "remove it, or give another name")
        )
    elif not request.dry_run and not destination.absolute().parent.is_dir():
        errors.append(no_directory(destination.parent))
    execution = ONE_BY_ONE
    with collect_errors(errors):
        execution = _execution(request)
    with collect_errors(errors):
        parse_bytes(request.shard, "--shard")
    wrong = misfits(request)
    for name, *one in out_of_range(request):
        wrong.append(UserError(f"--{name.replace('_', '-')}", *one))
    errors += wrong
    with collect_errors(errors):
        request, models = open_sources(request)
        if not wrong:
            plan = plan_of(request, models)
            errors += _not_computed(plan, request)
            errors += _not_written(plan, request)
    if errors:
        raise UserErrors([UserError(as_flag(e.where), e.what, e.fix) for e in errors])
    return request, models, plan, execution


def _with_gates(
    request: MixRequest, models: list[Checkpoint], gates: Gates
) -> tuple[MixRequest, Plan]:
    """With the routers that a file of mergekit's asks for. Rows made of prompts are kept beside the
    result, where ``btx verify`` reads them; a dry run keeps none."""
    if gates.mode == "uniform_random":  # as torch begins a linear layer
        width = models[0].architecture.model.hidden_size
        request = dataclasses.replace(request, router_init="uniform", router_init_std=width**-0.5)
        return request, plan_of(request, models)
    (base,) = (model.path for model in models if model.label == request.base)
    assert base is not None
    experts = [model.label for model in models if model.label != request.base]
    if request.dry_run:
        rows = MemorySource(mergekit_config.rows_of(gates, base, experts))
        return request, plan_of(request, models, rows)
    out = Path(request.out)
    file = out.with_name(f"{out.name}.router.safetensors")
    mergekit_config.write_rows(gates, base, experts, file)
    request = dataclasses.replace(request, router_init="centroids", centroids=str(file))
    return request, plan_of(request, models)


def _not_written(plan: Plan, request: MixRequest) -> list[UserError]:
    """Options that do not fit the result, as it turns out."""
    errors: list[UserError] = []
    if request.format == "hf" and request.family:
        with collect_errors(errors):
            wanted(plan.architecture, request.family)
    if request.fused and not plan.architecture.experts:
        errors.append(UserError("--fused", "the result has no experts to stack", "leave it out"))
    return errors


def _not_computed(plan: Plan, request: MixRequest) -> list[UserError]:
    """Why Megatron-Core, and so we, could not run the result: it is not written."""
    routing = plan.architecture.routing
    if routing is None or routing.type != "topk" or routing.moe_router_pre_softmax:
        return []
    if routing.moe_router_topk > 1:
        return []
    what = "the softmax over one selected logit is always 1: Megatron-Core refuses such a router"
    if request.method in ("append", "drop", "replace", "copy"):
        return [UserError(f"--method {request.method}", what, "give a model of at least top-2")]
    return [UserError("--moe-router-topk", what, "choose at least 2")]


def write(
    plan: Plan,
    request: MixRequest,
    models: list[Checkpoint],
    execution: Execution,
    hashes: Callable[[], Mapping[str, Mapping[str, str]]],
    revision: str | None,
) -> None:
    """The result in the format asked for, its lineage and a source's tokenizer with it."""
    destination, shard = Path(request.out), parse_bytes(request.shard, "--shard")
    speaker = speaker_of(models, request.tokenizer) or models[0]
    assert speaker.path is not None
    tokenizer = tokenizer_files(speaker.path, megatron=request.format == "megatron")
    known = {**token_ids(speaker.path), **carried(speaker)}
    known.pop("model_type", None)
    if (of_first := carried(models[0]).get("model_type")) is not None:
        known["model_type"] = of_first

    def files() -> dict[str, bytes]:
        lineage = lineage_of(plan, request, models, hashes(), revision)
        page: dict[str, bytes] = {}
        if request.format == "hf":
            said = unlike(plan.architecture, _written_as(plan, request, models), tokenizer)
            page = mix_card(plan, request, lineage, speaker, said).files()
        return {**tokenizer, **page, LINEAGE: as_json(lineage)}

    if request.format == "hf":
        write_hf(
            plan,
            destination,
            known=known,
            family=_written_as(plan, request, models),
            fused=request.fused,
            shard=shard,
            execution=execution,
            files=files,
            check=_opened,
        )
        return
    # Here, because the names of torch.distributed.checkpoint take a second to import.
    from megatron_btx.weights.write_torch_dist import write_torch_dist

    manifest = {
        "format": FORMAT,
        **plan.architecture.to_json(),
        "precision": _precision(plan),
        "step": 0,
        "consumed_samples": 0,
        "tokens": models[0].manifest.get("tokens") if request.method == "copy" else 0,
        "tokenizer": described_whole(place_of(speaker.path)) or speaker.manifest.get("tokenizer"),
        "huggingface": known if "model_type" in known else {},
        "layout": {},
        "lineage": {"mix": plan.hash, "sources": [str(model.path) for model in models]},
        "has_optimizer": False,
    }
    config = run_config(plan.architecture, manifest["precision"])
    bridge = {} if config is None else {RUN_CONFIG: config}
    write_torch_dist(
        plan,
        destination,
        shard=shard,
        execution=execution,
        files=lambda: {MANIFEST: as_json(manifest), **bridge, **files()},
        check=_opened,
    )


def _written_as(plan: Plan, request: MixRequest, models: list[Checkpoint]) -> str:
    """``model_type`` of a Hugging Face result: as asked, else that of the first source where it
    computes the result, else the first that does."""
    if request.family:
        return request.family
    of_first = carried(models[0]).get("model_type")
    return family_of(plan.architecture, preferred=of_first).model_type


def _words(plan: Plan, request: MixRequest, models: list[Checkpoint]) -> list[str]:
    """What is said of a result beside the plan: its tokenizer, and who computes it otherwise."""
    words = list(tokenizer_words(models, request.tokenizer))
    if request.format == "hf":
        speaker = speaker_of(models, request.tokenizer) or models[0]
        assert speaker.path is not None
        tokenizer = tokenizer_files(speaker.path, megatron=False)
        told = unlike(plan.architecture, _written_as(plan, request, models), tokenizer)
        words += [f"llama.cpp: {line}" for line in told]
    return words


def _opened(result: Path) -> None:
    """That what was written can be read: before it gets its name."""
    open_checkpoint(result, "the result")


def describe(
    plan: Plan, request: MixRequest, models: list[Checkpoint], execution: Execution
) -> str:
    """What ``--dry-run`` prints."""
    shown = plan
    if request.format == "hf":
        family = wanted(plan.architecture, _written_as(plan, request, models))
        shown = to_hf(plan, family, fused=request.fused)
    count = parameters(plan.architecture)
    free = shutil.disk_usage(_existing(Path(request.out))).free
    peak = _resident() + execution.workers * 8 * execution.slab
    return "\n".join(
        [
            shown.describe(),
            *_words(plan, request, models),
            f"{count.total_true_vocab:,} parameters, {count.active:,} active a token",
            f"memory: about {peak / 2**30:.2f} GiB; disk: {plan.nbytes / 2**30:.2f} GiB of "
            f"{free / 2**30:.2f} GiB free",
        ]
    )


def lineage_of(
    plan: Plan,
    request: MixRequest,
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


def _execution(request: MixRequest) -> Execution:
    """Slabs and workers that stay within a limit of memory.

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
            size = int(float(text))
        else:
            power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
            size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
        if size < 1:
            raise ValueError
        return size
    except (ValueError, OverflowError):
        raise UserError(where, f"{text!r} is not a size", "write 2GiB or 500MiB") from None


def _resident() -> int:
    """Resident bytes of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.absolute().parent
    return path
