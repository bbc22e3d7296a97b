"""One training stage on this rank: seed, an expert, the mixed model's finetuning, or the dense
baseline. They differ in where their weights come from and in what they read."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_btx.data.boundaries import check_attention
from megatron_btx.data.heldout_sequences import held_out
from megatron_btx.data.mixture import stage_data
from megatron_btx.data.tokenizer import load_tokenizer
from megatron_btx.engine import distributed, platform
from megatron_btx.engine.checkpoint import (
    TrainingState,
    load,
    manifest_of,
)
from megatron_btx.engine.initializer import initialize
from megatron_btx.engine.model import (
    DTYPES,
    build_model,
    data_parallel_config,
    transformer_config,
)
from megatron_btx.engine.optimizer import min_lr, optimizer_config
from megatron_btx.errors import UserError, UserErrors
from megatron_btx.evaluate.router_init_run import not_yet, run_routers
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.files import ProgressFile, newest_step, write_json
from megatron_btx.mix.anchored import branch
from megatron_btx.mix.one_model import copy, fresh
from megatron_btx.mix.plans import mix_plan
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.provenance import code_revision, versions
from megatron_btx.recipe import check, count, freezing, stages
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.check_mix import FROM_FILE
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.stages import directory as stage_directory
from megatron_btx.recipe.stages import model_stage
from megatron_btx.recipe.stages import training as stage_training
from megatron_btx.train import lineage, throughput, tracking
from megatron_btx.train.callbacks import (
    AverageLast,
    Callback,
    Checkpoints,
    CheckReplicas,
    HeldOutLoss,
    Log,
)
from megatron_btx.train.freezing import FreezingSchedule
from megatron_btx.train.loop import Run, listening, train
from megatron_btx.train.slow_ranks import SlowRanks
from megatron_btx.train.tracking import Tracker
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.manifest import read_manifest
from megatron_btx.weights.plan import Checkpoint, Plan


def run(recipe: Recipe, name: str, run_dir: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    """Run stage ``name`` on this rank, or go on with it; the environment says which rank it is.

    Args:
        recipe: the run's.
        name: of the stage.
        run_dir: of the run.
        needs: the stages that it waits for, whose artifacts it uses.

    Returns:
        ``{"checkpoint": the last one, relative to ``run_dir``, "step": ...}``. Of a run that was
        asked to stop, ``stopped.json`` in the stage's directory says the same.

    Raises:
        UserError: what it needs is missing, damaged or does not fit.
    """
    training = stage_training(recipe, name)
    distributed.initialize(training.layout, recipe.random_seed)
    with listening() as stop:
        progress, callbacks, log = _begin(recipe, name, training, run_dir)
        if log is not None:
            used = lineage.used_by(name, needs)
            log.tracker.use(tracking.artifacts(recipe, used, run_dir))
        train(progress, callbacks, stop)
        directory = stage_directory(run_dir, name)
        last = f"{directory.name}/checkpoints/step_{progress.step:08d}"
        outcome = {"checkpoint": last, "step": progress.step}
        if progress.stopped and distributed.is_first_rank():  # before it may be asked again
            write_json(directory / "stopped.json", outcome)
    distributed.shutdown()
    return outcome


def _begin(
    recipe: Recipe, name: str, training: Training, run_dir: Path
) -> tuple[Run, list[Callback], Log | None]:
    """Model, optimizer, schedule and data of the stage, where its last checkpoint left them."""
    directory = stage_directory(run_dir, name)
    checkpoints = directory / "checkpoints"
    steps = count.steps(training, recipe.model)
    resumed, manifest, plan = last_checkpoint(checkpoints), None, None
    if resumed is not None:
        path, architecture, manifest = resumed
    else:
        plan = starting_point(recipe, name, training, run_dir, look=False)
        architecture = plan.architecture

    model = build_model(
        architecture,
        training.layout,
        training.precision,
        random_seed=recipe.random_seed,
        options=training.megatron,
    )
    loaded: dict[str, float] = {}
    if plan is not None:
        started = time.perf_counter()
        size = distributed.summed(sum(initialize(model, plan).values()))
        loaded = throughput.of_transfer("load", size, time.perf_counter() - started)
    step = manifest["step"] if manifest else 0
    phases = FreezingSchedule(architecture, training, recipe.model)
    ddp, optimizer, schedule = phases.begin(model, step)
    if resumed is not None and manifest is not None:
        started = time.perf_counter()
        whole = manifest["has_optimizer"]
        load(
            path,
            TrainingState(model=ddp, optimizer=optimizer, schedule=schedule)
            if whole
            else TrainingState(model=ddp),
        )
        if distributed.is_first_rank():
            loaded = throughput.of_checkpoint("load", path, time.perf_counter() - started)
    data = stage_data(recipe, name, run_dir)
    progress = Run(
        model=ddp,
        optimizer=optimizer,
        schedule=schedule,
        batches=data.batches,
        total_steps=steps,
        num_microbatches=data.num_microbatches,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        seq_length=recipe.model.seq_length,
        masked=training.eod_mask_loss,
        step=step,
        device=throughput.device(
            phases.flops_per_token(step), training.layout.world_size, recipe.peak_tflops
        ),
        thaws_at=freezing.thaws_at(training, recipe.model),
        thaw=phases.thaw,
    )
    lineage = manifest["lineage"] if manifest else _lineage(recipe, name, training, plan)
    callbacks, log = _callbacks(recipe, name, training, run_dir, progress, architecture, lineage)
    if log is not None and loaded.get("train/checkpoint_load_GB"):
        log.write("load", progress.step, loaded)
    return progress, callbacks, log


def last_checkpoint(checkpoints: Path) -> tuple[Path, Architecture, dict[str, Any]] | None:
    """What a stage goes on from, with its manifest; ``None`` where it begins. The first rank looks
    and tells the others: another machine's view of a network file system may be older, and ranks
    would go on from different steps."""
    found = None
    if distributed.is_first_rank() and (newest := newest_step(checkpoints)) is not None:
        found = (newest, *read_manifest(newest))
    seen: tuple[Path, Architecture, dict[str, Any]] | None = distributed.from_first_rank(found)
    return seen


def _trained(run_dir: Path, stage: str) -> Path:
    """The checkpoint that a finished stage left, as the first rank sees it."""
    first = distributed.is_first_rank()
    found: Path = distributed.from_first_rank(
        find_checkpoint(stage_directory(run_dir, stage)) if first else None
    )
    return found


def starting_point(
    recipe: Recipe, name: str, training: Training, run_dir: Path, *, look: bool
) -> Plan:
    """The plan of the weights that a stage begins with: fresh draws for the seed, the seed (or
    two of it, anchored) for experts and the dense baseline, the mix for the finetuning. Every rank
    calls it; where someone only looks, one does, and routers that would be computed are zero."""
    dtype = DTYPES[training.precision]
    if name == "seed":
        tokenizer = load_tokenizer(run_dir / "prepare" / "tokenizer")
        architecture = Architecture(model=recipe.model, vocab_size=tokenizer.vocab_size)
        return fresh(architecture, seed=recipe.random_seed, dtype=dtype)
    model, router = functools.cache(functools.partial(_model, run_dir)), None
    if routers_of_run(recipe, name):
        models = [model(label) for label in recipe.model_names]
        labels = recipe.model_names
        router = not_yet(recipe, labels) if look else _routers(recipe, run_dir, models, training)
    return from_models(recipe, name, training, model, router)


def routers_of_run(recipe: Recipe, name: str) -> bool:
    """Whether a stage begins with routers that are computed from the run's own text."""
    mix = recipe.mix
    return name == "finetune" and mix.router_init in FROM_FILE and mix.centroids is None


def _routers(
    recipe: Recipe, run_dir: Path, models: Sequence[Checkpoint], training: Training
) -> RouterInit:
    """Computed where the finetuning begins, which says so until its first step."""
    progress = ProgressFile(stage_directory(run_dir, "finetune") / "progress.json")

    def told(done: float) -> None:
        if distributed.is_first_rank():
            progress(f"{recipe.mix.router_init} of the routers,", done)

    told(0.0)
    found = run_routers(recipe, run_dir, models, training, told)
    if distributed.is_first_rank():
        progress.forget()
    return found


def from_models(
    recipe: Recipe,
    name: str,
    training: Training,
    model: Callable[[str], Checkpoint],
    router: RouterInit | None,
) -> Plan:
    """What a stage after the seed begins with.

    Args:
        recipe: the run's.
        name: of the stage.
        training: its settings.
        model: a model of the mix by its label, ``seed`` or a domain.
        router: of the finetuning, where it is not as the recipe's ``mix`` says.
    """
    dtype = DTYPES[training.precision]
    if name == "finetune":
        return mix_plan(
            [model(label) for label in recipe.model_names],
            router=router,
            mix=recipe.mix,
            routing=recipe.routing,
            dtype=dtype,
            random_seed=recipe.random_seed,
        )
    seed = model("seed")
    if training.anchor is None:
        return copy(seed, dtype=dtype)
    router = RouterInit(seed=recipe.random_seed)
    name = name.removeprefix("expert:")
    return branch(seed, name, routing=recipe.routing, dtype=dtype, router=router)


def _model(run_dir: Path, name: str) -> Checkpoint:
    """The model of a finished stage, ``seed`` or a domain's expert."""
    return open_checkpoint(_trained(run_dir, model_stage(name)), name)


def check_options(recipe: Recipe) -> None:
    """Make every stage's configurations of Megatron's, before any is trained for hours.

    Raises:
        UserErrors: what Megatron or our modules would refuse, stage by stage.
    """
    wrong: list[UserError] = []
    for name, training in check.stages(recipe).items():
        architecture = stages.architecture(recipe, stages.stage_of_key(name))
        try:
            options = training.megatron
            transformer_config(architecture, training.layout, training.precision, options)
            data_parallel_config(training.use_distributed_optimizer, options)
            optimizer_config(training)
            if training.reset_attention_mask:
                check_attention(platform.detect())
        except UserError as error:
            wrong.append(UserError(name, str(error)))
    if wrong:
        raise UserErrors(wrong)


def check_mix(recipe: Recipe, run_dir: Path) -> dict[str, Any]:
    """Plan the mix that the finetuning will begin with: every checkpoint is opened, every tensor
    accounted for, and nothing is written.

    Returns:
        ``{"plan": its hash, "made_of": what it does, line by line}``.

    Raises:
        UserError: a checkpoint is missing, damaged or of another model.
    """
    plan = starting_point(recipe, "finetune", recipe.finetune, run_dir, look=True)
    return {"plan": plan.hash, "made_of": plan.describe().splitlines()}


_SCHEDULE = ("lr", "lr_warmup_iters", "lr_decay_style", "lr_wsd_decay_style", "lr_wsd_decay_iters")


def _lineage(recipe: Recipe, name: str, training: Training, plan: Plan | None) -> dict[str, Any]:
    """Where a model comes from: stage, plan, sources, schedule, seeds and code."""
    assert plan is not None
    return {
        "recipe": recipe.name,
        "stage": name,
        "random_seed": recipe.random_seed,
        "plan": plan.hash,
        "made_of": plan.describe().splitlines(),
        "sources": {label: str(source) for label, source in plan.sources.items()},
        "optimizer_state": "fresh",
        "schedule": {
            **{name: getattr(training, name) for name in _SCHEDULE},
            "min_lr": min_lr(training),
            "steps": count.steps(training, recipe.model),
        },
        "versions": versions(),
        "code_revision": code_revision(),
    }


def _callbacks(
    recipe: Recipe,
    name: str,
    training: Training,
    run_dir: Path,
    progress: Run,
    architecture: Architecture,
    lineage: dict[str, Any],
) -> tuple[list[Callback], Log | None]:
    directory = stage_directory(run_dir, name)
    tokenizer = load_tokenizer(run_dir / "prepare" / "tokenizer")
    log = None
    if distributed.is_first_rank():
        log = Log(
            directory / "metrics.jsonl",
            Tracker(recipe, name, directory, {"recipe": recipe.name, **asdict(training)}),
            progress.step,
            *tracking.artifacts(recipe, [name], run_dir),
        )
        log.write(
            "start",
            progress.step,
            {
                "total_steps": progress.total_steps,
                "tokens_per_step": progress.tokens_per_step,
                "world_size": training.layout.world_size,
                "flops_per_token": progress.device.flops_per_token,
                "peak_tflops": progress.device.peak_tflops,
            },
        )

    def manifest(run: Run) -> dict[str, Any]:
        return manifest_of(
            architecture,
            precision=training.precision,
            step=run.step,
            consumed_samples=run.step * run.global_batch_size,
            tokens=run.step * run.tokens_per_step,
            tokenizer=tokenizer.describe(),
            layout={**asdict(training.layout), "world_size": training.layout.world_size},
            lineage=lineage,
            **({} if training.anchor is None else {"anchor": training.anchor}),
        )

    averaged = count.averaged_steps(training, recipe.model)
    evaluation = held_out(recipe, run_dir, tokens=training.eval_tokens)
    listeners: list[Callback] = [SlowRanks(), *([] if log is None else [log])]
    saving = Checkpoints(
        directory / "checkpoints",
        training,
        manifest,
        lambda target: tokenizer.save(target / "tokenizer"),
        log,
        averaged,
    )
    callbacks: list[Callback] = [
        *listeners,
        AverageLast(directory / "checkpoints", averaged, training.precision, manifest, saving),
        HeldOutLoss(evaluation, training, log),
        CheckReplicas(training),
        saving,
    ]
    return callbacks, log
