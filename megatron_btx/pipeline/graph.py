"""A recipe's stages and what each one waits for. Data, and free of torch.

One graph holds all systems (recipe/systems.py): a system is the kinds of stages that take part,
and what a stage needs of other kinds is left out. Experts of zero tokens are linked to the seed.

Every stage has a key (keys.py), and is done when ``done.json`` in its directory holds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.pipeline.keys import Memo, StageKeys
from megatron_btx.recipe import systems
from megatron_btx.recipe.schema import Layout, Recipe
from megatron_btx.recipe.stages import expert_stage, flops, imported, training

NEEDS: dict[str, tuple[str, ...]] = {
    "prepare": (),
    "seed": ("prepare",),
    "expert": ("prepare", "seed"),
    "mix": ("prepare", "seed", "expert"),
    "finetune": ("prepare", "seed", "expert", "mix"),
    "dense": ("prepare", "seed"),
    "evaluate": ("prepare", "seed", "expert", "finetune", "dense"),
    "export": ("finetune",),
    "report": ("prepare", "seed", "expert", "finetune", "dense", "evaluate", "export"),
}
"""What each kind of stage waits for; ``expert`` stands for every one of them."""

LOOKS_AHEAD = {"mix": "finetune"}
"""Kinds that check another stage's inputs: one rank finds in seconds what that stage would fail on
at its start, before it waits for its nodes. They have that stage's key, are done when it is, and
nothing reads their output. (The weights are mixed where they are trained, each rank its part.)
"""

TRAINED = ("seed", "expert", "finetune", "dense")
"""Kinds that train a model; so does ``import``, which takes a finished one in a stage's place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One job: some ranks that make one model or one table, and say so when they are done."""

    name: str
    """``seed``, ``expert:math``, ..."""
    kind: str
    """A key of ``NEEDS``, or ``import`` where a checkpoint is taken instead of trained."""
    needs: tuple[str, ...] = ()
    """Names of the stages that must be done before."""
    world_size: int = 1
    num_threads: int = 1
    """CPU threads a rank."""
    key: str = ""
    work: float = 0.0
    """Estimated training FLOPs a core: what should be started first (local/run_stages.py)."""

    @property
    def directory(self) -> str:
        """Name of its directory in the run's; parts of ``prepare`` lie in its own."""
        return self.name.replace(":", "/" if self.kind == "prepare" else "-")

    @property
    def cores(self) -> int:
        """CPU cores that it fills."""
        return self.world_size * self.num_threads


def outline(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages of a recipe without their keys, each after all that it needs: reads no file."""
    stages: dict[str, Stage] = {}
    for kind in systems.kinds(recipe):
        if kind in LOOKS_AHEAD and imported(recipe, LOOKS_AHEAD[kind]) is not None:
            continue  # what is taken from a checkpoint begins with nothing
        for name in _names(recipe, kind):
            stages[name] = _stage(recipe, kind, name, tuple(stages.values()))
    return tuple(stages.values())


def build(recipe: Recipe, memo: Memo | None = None) -> tuple[Stage, ...]:
    """The stages of a recipe, each after all that it needs.

    Reads the files that the recipe names (keys.py), writes nothing.
    """
    keys = StageKeys(recipe, memo or Memo())
    stages: dict[str, Stage] = {}
    for stage in outline(recipe):
        kind = LOOKS_AHEAD.get(stage.kind, stage.kind)
        name = stage.name if kind == stage.kind else kind
        apart = ("prepare", *LOOKS_AHEAD)  # the text enters by content, and a look makes nothing
        models = {need: stages[need].key for need in stage.needs if need not in apart}
        stages[stage.name] = dataclasses.replace(stage, key=keys.key(name, kind, models))
    return tuple(stages.values())


def of_run(recipe: Recipe, run_dir: Path) -> tuple[Stage, ...]:
    """:func:`build` with the run's memo of hashes, which is brought up to date where the run has
    begun. Whoever may not write there asks every time."""
    memo = Memo(run_dir / "fingerprints.json")
    stages = build(recipe, memo)
    if (run_dir / "recipe.yaml").exists():
        with contextlib.suppress(OSError):
            memo.save()
    return stages


def until(stages: Iterable[Stage], name: str) -> tuple[Stage, ...]:
    """Stage ``name`` and all that it waits for."""
    by_name = {stage.name: stage for stage in stages}
    wanted = {find(by_name.values(), name, "--stop-after").name}
    for stage in reversed(by_name.values()):
        if stage.name in wanted:
            wanted.update(stage.needs)
    return tuple(stage for stage in by_name.values() if stage.name in wanted)


def read_by(stage: Stage, stages: Iterable[Stage]) -> tuple[Stage, ...]:
    """The stages whose results a stage reads: those that it waits for, but for a look ahead."""
    needed = (other for other in stages if other.name in stage.needs)
    return tuple(other for other in needed if other.kind not in LOOKS_AHEAD)


def find(stages: Iterable[Stage], name: str, where: str = "") -> Stage:
    """The stage of that name.

    Args:
        stages: of a recipe.
        name: of the stage.
        where: the flag that names it.

    Raises:
        UserError: there is none.
    """
    by_name = {stage.name: stage for stage in stages}
    if name not in by_name:
        raise no_stage(name, by_name, where)
    return by_name[name]


def no_stage(name: str, names: Iterable[str], where: str = "") -> UserError:
    """That a recipe has no stage ``name``: the nearest of those that it has, or all."""
    known = list(names)
    what = f"there is no stage {name}" if where else "is not a stage of this recipe"
    near = get_close_matches(name.replace("-", ":").lower(), known, 1, 0.6)
    fix = f"did you mean {near[0]}? " if near else ""
    return UserError(where or name, what, f"{fix}choose {', '.join(known)}")


def _names(recipe: Recipe, kind: str) -> Iterator[str]:
    if kind == "expert":
        yield from map(expert_stage, recipe.experts)
    else:
        yield kind


def _stage(recipe: Recipe, kind: str, name: str, before: tuple[Stage, ...]) -> Stage:
    """The stage without its key."""
    needs = tuple(stage.name for stage in before if stage.name.partition(":")[0] in NEEDS[kind])
    source = imported(recipe, name) if kind in TRAINED else None
    if source is not None:
        return Stage(name=name, kind="import", needs=("seed",) if source == "seed" else ())
    if kind in ("mix", "finetune") and "seed" not in recipe.model_names:
        needs = tuple(need for need in needs if need != "seed")
    work = 0.0
    layout = recipe.evaluate.layout if kind == "evaluate" else Layout()
    if kind in TRAINED:
        layout = training(recipe, name).layout
        work = float(flops(recipe, name)) / (layout.world_size * layout.num_threads)
    elif kind == "export":  # one rank with the whole of the evaluation's cores
        cores = recipe.evaluate.layout
        layout = Layout(num_threads=cores.world_size * cores.num_threads)
    return Stage(
        name=name,
        kind=kind,
        needs=needs,
        world_size=layout.world_size,
        num_threads=layout.num_threads,
        work=work,
    )
