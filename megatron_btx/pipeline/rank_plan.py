"""What every rank of a stage will hold, read and write, before anything runs: ``btx plan --ranks``.

Only those ranks are built (engine/simulated_ranks.py) that differ. A rank's part of an expert
follows from its place in the expert groups, its part of all else from that in the tensor-parallel
group; both are counted through within the first ``lcm(TP, ETP x EP)`` ranks of a pipeline stage,
and the other ranks of it are copies of these. Of the stages between the first and the last one is
built, as each holds what the one before it does, some layers on.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm
from pathlib import Path

from megatron_btx.engine.model import DTYPES
from megatron_btx.engine.simulated_ranks import Held, held, optimizer_bytes, rank, simulated_model
from megatron_btx.errors import UserError
from megatron_btx.evaluate.router_init_run import not_yet
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.pipeline import graph
from megatron_btx.pipeline.import_checkpoint import aligned
from megatron_btx.recipe import memory
from megatron_btx.recipe import stages as of_recipe
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.run_plan import human
from megatron_btx.recipe.schema import Model, Recipe, Training
from megatron_btx.train.freezing import FreezingSchedule
from megatron_btx.train.train_stage import from_models, routers_of_run
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import Unread
from megatron_btx.weights.statistics import Statistics

Span = tuple[int, int]
"""Of the rank that has least, and of the one that has most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """A stage by rank."""

    stage: str
    ranks: int
    built: int
    """Ranks that were built; the others are copies of these."""
    parameters: Span
    optimizer_bytes: Span
    """Two moments, and in bf16 the fp32 weights."""
    bytes_read: Span
    """Of sources, as the stage begins."""
    bytes_read_of: dict[str, Span]
    """Of each source."""
    bytes_read_by_all: dict[str, int]
    """Of each source, by all ranks together."""
    bytes_needed: int
    """What all ranks would read if nothing were read twice."""
    files: int
    """``.distcp`` files of a checkpoint with the optimizer: every rank's generators."""
    files_without_optimizer: int
    checkpoint_bytes: int
    checkpoint_bytes_without_optimizer: int
    largest_file: int
    """Bytes of tensors in the largest file of the last one, without the optimizer."""

    def render(self) -> str:
        """As plain text."""
        parameters = _between(*(human(number) for number in self.parameters))
        lines = [
            f"{self.stage}: {self.ranks} rank{'s'[: self.ranks - 1]}, {self.built} built",
            f"  parameters of a rank: {parameters}; optimizer: {_bytes(self.optimizer_bytes)}",
        ]
        if self.bytes_needed:
            every = sum(self.bytes_read_by_all.values())
            times = f"{every / self.bytes_needed:.2f} times what is needed once"
            reads = f"{_bytes(self.bytes_read)} a rank, {human(every, 'B')} by all, {times}"
            lines.append(f"  read: {reads}")
        for label, span in self.bytes_read_of.items():
            total = human(self.bytes_read_by_all[label], "B")
            lines.append(f"    of {label}: {_bytes(span)} a rank, {total} by all")
        whole, last = self.checkpoint_bytes, self.checkpoint_bytes_without_optimizer
        lines += [
            f"  a checkpoint: {_files(self.files)}, {human(whole, 'B')}",
            f"  the last, weights only: {_files(self.files_without_optimizer)}, "
            f"{human(last, 'B')}, the largest {human(self.largest_file, 'B')}",
        ]
        return "\n".join(lines)


def of_run(recipe: Recipe, stages: Iterable[str]) -> Iterator[RankPlan]:
    """Those of a recipe's training stages, one after the other.

    Raises:
        UserErrors: a checkpoint that a stage is taken ``from:`` is not there, so that what it
            stores is not known. Or the mix computes numbers from whole models beforehand.
    """
    for name in stages:
        training = of_recipe.training(recipe, name)
        architecture = of_recipe.architecture(recipe, name)
        plan = None if name == "seed" else _plan(recipe, name, training)
        yield of_stage(name, architecture, training, recipe.model, plan)


def of_stage(
    name: str, architecture: Architecture, training: Training, model: Model, plan: Plan | None
) -> RankPlan:
    """One stage's.

    Args:
        name: what it is called.
        architecture: of what it trains.
        training: its settings.
        model: the recipe's.
        plan: of the weights that it begins with; ``None``: it reads none.
    """
    layout = training.layout
    period = lcm(layout.tensor_model_parallel_size, layout.etp * layout.expert_model_parallel_size)
    in_stage = layout.world_size // layout.pipeline_model_parallel_size
    stages = _alike(layout.pipeline_model_parallel_size)
    assert in_stage % period == 0, "Megatron's groups of a pipeline stage are whole"
    built = {
        stage: [held(architecture, training, stage * in_stage + at, plan) for at in range(period)]
        for stage in stages
    }
    every = [one for ranks in built.values() for one in ranks]
    optimizers = [
        _optimizer(architecture, training, model, stage * in_stage + at)
        for stage in stages
        for at in sorted({0, in_stage - 1})
    ]
    labels = [] if plan is None else list(plan.sources)
    read = {stage: reading(ranks, in_stage) for stage, ranks in built.items()}
    apiece = [one for ranks in read.values() for one in ranks]
    written = {
        stage: [_written(one) for one in ranks if _written(one)] for stage, ranks in built.items()
    }
    return RankPlan(
        stage=name,
        ranks=layout.world_size,
        built=len(every),
        parameters=_span(sum(one.parameters) for one in every),
        optimizer_bytes=_span(optimizers),
        bytes_read=_span(one.total() for one in apiece),
        bytes_read_of={label: _span(one[label] for one in apiece) for label in labels},
        bytes_read_by_all={
            label: sum(
                times * sum(one[label] for one in read[stage]) for stage, times in stages.items()
            )
            for label in labels
        },
        bytes_needed=_needed(built, stages),
        files=layout.world_size,
        files_without_optimizer=sum(times * len(written[s]) for s, times in stages.items()),
        checkpoint_bytes=memory.checkpoint_bytes(architecture, training),
        checkpoint_bytes_without_optimizer=memory.checkpoint_bytes(
            architecture, training, has_optimizer=False
        ),
        largest_file=max(size for sizes in written.values() for size in sizes),
    )


def _alike(pipeline_stages: int) -> dict[int, int]:
    """The pipeline stages that are built, and how many are like each."""
    if pipeline_stages <= 2:
        return dict.fromkeys(range(pipeline_stages), 1)
    return {0: 1, 1: pipeline_stages - 2, pipeline_stages - 1: 1}


def reading(built: Sequence[Held], in_stage: int) -> list[Counter[str]]:
    """What each rank of a pipeline stage reads of each source.

    Megatron counts a stage's ranks through its tensor-parallel (or expert) groups first and through
    data parallelism last, so rank ``n`` of it is replica ``n // (in_stage / replicas)``.
    """
    of_replica: list[list[list[Counter[str]]]] = []
    for one in built:
        groups = []
        for _, count, slabs in one.to_make:
            shares: list[Counter[str]] = [Counter() for _ in range(count)]
            for at, slab in enumerate(slabs):
                shares[at % count].update(slab.read)
            groups.append(shares)
        of_replica.append(groups)
    found = []
    for number in range(in_stage):
        own: Counter[str] = Counter()
        for shares in of_replica[number % len(built)]:
            own.update(shares[number // (in_stage // len(shares))])
        found.append(own)
    return found


def _needed(built: dict[int, list[Held]], stages: dict[int, int]) -> int:
    """Bytes of sources for every slab once, whoever holds it."""
    once = {}
    for stage, times in stages.items():
        for one in built[stage]:
            for _, _, slabs in one.to_make:
                for slab in slabs:
                    once[slab.key, slab.box] = times * sum(slab.read.values())
    return sum(once.values())


def _written(one: Held) -> int:
    """Bytes of the tensors that a checkpoint has from a rank."""
    return sum(piece.nbytes for piece in one.pieces if piece.is_written)


def _optimizer(architecture: Architecture, training: Training, model: Model, number: int) -> int:
    with rank(training.layout, number):
        module = simulated_model(architecture, training)
        _, optimizer, _ = FreezingSchedule(architecture, training, model).begin(module, 0)
        return optimizer_bytes(optimizer, training)


def _span(values: Iterable[int]) -> Span:
    found = list(values)
    return min(found), max(found)


def _plan(recipe: Recipe, name: str, training: Training) -> Plan:
    """What a stage begins with, of models that need not be there yet."""
    model = functools.cache(lambda label: _model(recipe, label))
    router = not_yet(recipe, recipe.model_names) if routers_of_run(recipe, name) else None
    plan = from_models(recipe, name, training, model, router)
    if computed := [one for one, of in plan.sources.items() if isinstance(of, Statistics)]:
        of = computed[0].rpartition("/")[2]
        what = f"needs {of}: statistics of whole models, whose reading is not counted"
        raise UserError("mix", what, "plan without --ranks, or mix without them")
    return plan


def _model(recipe: Recipe, label: str) -> Checkpoint:
    """A model of the mix as its stage will leave it, or as it is where the stage takes it."""
    stage = of_recipe.model_stage(label)
    source = graph.imported(recipe, stage)
    if source == "seed" and graph.imported(recipe, "seed") is not None:
        source = graph.imported(recipe, "seed")
    if source not in (None, "seed"):
        if not Path(source).exists():
            where = f"{of_recipe.recipe_key(stage)}.from"
            what = f"{source} is not there, so what a rank would read of it is not known"
            raise UserError(where, what, "create it first, or run without --ranks")
        if recipe.mix.align_vocab:
            return aligned(recipe)[0][label]
        return open_checkpoint(source, label)
    architecture = of_recipe.architecture(recipe, stage if source is None else "seed")
    dtype = DTYPES[of_recipe.training(recipe, stage if source is None else "seed").precision]
    tensors = {name: (shape, dtype) for name, shape in canonical_tensors(architecture).items()}
    return Checkpoint(label, None, architecture, Unread(tensors))


def _files(count: int) -> str:
    return f"{count} file{'s'[: count - 1]}"


def _bytes(span: Span) -> str:
    return _between(*(human(number, "B") for number in span))


def _between(least: str, most: str) -> str:
    return least if least == most else f"{least} to {most}"
