"""What every stage of a recipe will cost, before anything runs: ``btx plan``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_btx.files import json_text
from megatron_btx.recipe import check, count, memory, systems
from megatron_btx.recipe import stages as of_recipe
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.messages import aligned
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.stages import stage_of_key, training


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One training stage in numbers. A stage taken ``from:`` a checkpoint trains nothing."""

    name: str
    """As in a run directory: ``seed``, ``expert:math``, ``finetune``, ``dense``."""
    taken_from: str | None
    params_total: int
    params_active: int
    vocab_padding: int
    """Parameters among ``params_total`` that pad the vocabulary."""
    tokens: int
    steps: int
    flops_per_token: int
    """Of training, mean over its steps."""
    train_flops: int
    inference_flops_per_token: int
    ranks: int
    memory_per_rank: memory.Memory
    checkpoint_bytes: int
    """A checkpoint to go on from, with the optimizer."""
    disk_bytes: int
    """What is left when the stage is done: the last checkpoint, weights only."""
    peak_disk_bytes: int
    """The most on the way: the checkpoints that are kept, and one that is being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """A recipe's stages, and what its system costs without its baseline and its seed."""

    recipe: str
    system: str
    stages: tuple[StagePlan, ...]
    made_by: tuple[str, ...]
    """The stages that made the system after the seed; of the seed, itself."""
    system_tokens: int
    """What made the system after the seed, of BTX experts and finetuning; of the seed, itself."""
    system_flops: int
    total_flops: int
    total_disk_bytes: int
    """All checkpoints when the run is done."""
    peak_disk_bytes: int
    """The most that they take at one time (:func:`peak_disk`)."""


def plan(recipe: Recipe) -> RunPlan:
    """The numbers of a recipe; pure arithmetic."""
    taking_part = systems.kinds(recipe)
    names = [stage_of_key(key) for key in check.stages(recipe)]
    names = [name for name in names if name.partition(":")[0] in taking_part]
    stages = tuple(_stage(recipe, name) for name in names)
    made_by = systems.rows(recipe)[-1].made_by
    own = [stage for stage in stages if stage.name in made_by]
    return RunPlan(
        recipe=recipe.name,
        system=recipe.system,
        stages=stages,
        made_by=tuple(made_by),
        system_tokens=sum(stage.tokens for stage in own),
        system_flops=sum(stage.train_flops for stage in own),
        total_flops=sum(stage.train_flops for stage in stages),
        total_disk_bytes=sum(stage.disk_bytes for stage in stages),
        peak_disk_bytes=peak_disk(stages),
    )


def warnings(recipe: Recipe) -> Iterator[str]:
    """Warnings of what is allowed but probably not meant: a stage that ends before its warm-up, or
    saves less often than it averages, or a split into one."""
    taking_part = systems.kinds(recipe)
    if recipe.mix.method == "split" and recipe.mix.num_chunks == 1:
        yield "mix.num_chunks: is 1: split cuts each feed-forward layer into 1 expert, as btx does"
    for key in check.stages(recipe):
        name = stage_of_key(key)
        if name.partition(":")[0] not in taking_part:
            continue
        stage = training(recipe, name)
        steps = count.steps(stage, recipe.model) if stage.from_ is None else 0
        saved = len(count.averaged_steps(stage, recipe.model))
        if steps and saved < stage.average_last:
            yield (
                f"{key}: average_last is {stage.average_last}, and {steps} steps save {saved} "
                "checkpoints: all of them are averaged; lower `save_interval`"
            )
        if 0 < steps <= stage.lr_warmup_iters:
            yield (
                f"{key}: {steps} step{'s'[: steps - 1]} under a warm-up of "
                f"{stage.lr_warmup_iters}: the learning rate never reaches its peak; give more "
                "`tokens`, or lower `lr_warmup_iters`"
            )


_AT_WORK = {"seed": (0, 0), "expert": (1, 1), "dense": (1, 2), "finetune": (2, 2)}
"""From which moment of a run to which a kind of stage may be at work."""


def peak_disk(stages: Iterable[StagePlan]) -> int:
    """The most bytes that the checkpoints of these stages take at one time: the seed's, then those
    of experts and dense baseline side by side, then the finetuning's beside the baseline's."""

    def held(stage: StagePlan, moment: int) -> int:
        first, last = _AT_WORK[stage.name.partition(":")[0]]
        if moment < first:
            return 0
        return stage.peak_disk_bytes if moment <= last else stage.disk_bytes

    stages = tuple(stages)
    return max(sum(held(stage, moment) for stage in stages) for moment in range(3))


def _stage(recipe: Recipe, name: str) -> StagePlan:
    stage = training(recipe, name)
    architecture = of_recipe.architecture(recipe, name)
    parameters = count.parameters(architecture)
    steps = count.steps(stage, recipe.model) if stage.from_ is None else 0
    tokens = steps * stage.global_batch_size * recipe.model.seq_length
    flops = of_recipe.flops(recipe, name) if steps else 0
    checkpoint = memory.checkpoint_bytes(architecture, stage)
    done, peak = _disk(stage, architecture, steps, _ancestors(recipe, name))
    return StagePlan(
        name=name,
        taken_from=stage.from_,
        params_total=parameters.total,
        params_active=parameters.active,
        vocab_padding=parameters.vocab_padding,
        tokens=tokens,
        steps=steps,
        flops_per_token=flops // tokens if steps else count.training_flops_per_token(architecture),
        train_flops=flops,
        inference_flops_per_token=count.forward_flops_per_token(architecture),
        ranks=stage.layout.world_size,
        memory_per_rank=memory.training_memory(architecture, stage),
        checkpoint_bytes=checkpoint,
        disk_bytes=done,
        peak_disk_bytes=peak,
    )


_MANIFEST = 4500
"""Bytes of a checkpoint's manifest for its model and for each that this was made from."""


def _disk(
    stage: Training, architecture: Architecture, steps: int, ancestors: int
) -> tuple[int, int]:
    """Bytes of a stage's checkpoints: (when it is done, at most). The last step's has no optimizer,
    and what is older than the recipe keeps goes when a new one is whole."""
    if not steps:
        return 0, 0
    whole = memory.checkpoint_bytes(architecture, stage)
    done = memory.checkpoint_bytes(architecture, stage, has_optimizer=False)
    done += _MANIFEST * (1 + ancestors)
    saved, keep = (steps - 1) // stage.save_interval, stage.keep_checkpoints
    last = done if stage.average_last == 1 else 2 * done  # beside the last step's own, their mean
    keep = max(keep, stage.average_last - 1)
    return done, max(min(saved, keep + 1) * whole, min(saved, keep) * whole + last)


def _ancestors(recipe: Recipe, name: str) -> int:
    """How many models a stage's was made from."""
    if name == "finetune":
        return len({"seed", *recipe.model_names})
    return int(name != "seed")


_SYSTEM = {
    "seed": "The seed",
    "experts": "The last expert after the seed",
    "dense": "The dense baseline after the seed",
    "upcycling": "Sparse upcycling after the seed",
    "btm": "Branch-Train-Merge after the seed (experts)",
    "btx": "Branch-Train-MiX after the seed (experts and finetune)",
}

COLUMNS = (
    *("stage", "params", "active", "tokens", "steps", "FLOPs", "ranks"),
    *("GPU memory", "CPU memory", "disk", "disk peak"),
)
"""Heads of the table of :func:`rows`."""


def rows(plan: RunPlan) -> list[tuple[str, ...]]:
    """The table's cells, a row a stage and one of totals."""
    table = [
        (
            stage.name,
            human(stage.params_total),
            human(stage.params_active),
            human(stage.tokens) if stage.steps else "-",
            f"{stage.steps:,}" if stage.steps else "-",
            f"{stage.train_flops:.2e}" if stage.steps else "-",
            str(stage.ranks) if stage.steps else "-",
            human(stage.memory_per_rank.allocated, "B") if stage.steps else "-",
            human(stage.memory_per_rank.resident, "B") if stage.steps else "-",
            human(stage.disk_bytes, "B") if stage.steps else "-",
            human(stage.peak_disk_bytes, "B") if stage.steps else "-",
        )
        for stage in plan.stages
    ]
    total = f"{plan.total_flops:.2e}"
    disk = (human(plan.total_disk_bytes, "B"), human(plan.peak_disk_bytes, "B"))
    return [*table, ("all stages", "", "", "", "", total, "", "", "", *disk)]


def render(plan: RunPlan) -> str:
    """The plan as plain text."""
    lines = aligned([COLUMNS, *rows(plan)])
    lines.insert(1, "-" * len(lines[0]))
    lines.insert(len(lines) - 1, "-" * len(lines[0]))
    return "\n".join([f"Plan of {plan.recipe}", "", *lines, "", *notes(plan)])


def notes(plan: RunPlan) -> list[str]:
    """The lines under the table."""
    lines = [
        f"{_SYSTEM[plan.system]}: {human(plan.system_tokens)} tokens, "
        f"{plan.system_flops:.2e} FLOPs.",
        "Memory is a rank's peak: allocated on a GPU, or resident on a CPU.",
        "Disk: the checkpoints that are left when a stage is done, and the most on the way to it.",
    ]
    savings = [stage.memory_per_rank.saving for stage in plan.stages if stage.steps]
    if saving := max(savings, default=0):
        lines.append(
            f"Asynchronous saves take up to {human(saving, 'B')} of a host's memory a rank."
        )
    for stage in plan.stages:
        if stage.taken_from is not None:
            lines.append(f"{stage.name} is taken from {stage.taken_from}.")
    padding = plan.stages[0].vocab_padding
    if padding:
        lines.append(f"Of each model's parameters {human(padding)} pad the vocabulary.")
    return lines


def human(number: float, unit: str = "") -> str:
    """Three significant digits or one decimal: ``6.7B``, ``533.0B``, ``1.3MB`` (powers of 1000)."""
    for factor, suffix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}{unit}"
    return f"{number:.0f}{unit}"


def as_json(plan: RunPlan, **more: Any) -> str:
    """The plan for other programs; numbers unrounded. ``more`` joins it."""
    content: dict[str, Any] = asdict(plan)
    for entry, stage in zip(content["stages"], plan.stages, strict=True):
        used = stage.memory_per_rank
        entry["memory_per_rank"] |= {"allocated": used.allocated, "resident": used.resident}
    return json_text(content | more, indent=1)
