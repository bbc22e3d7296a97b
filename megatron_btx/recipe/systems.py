"""The systems that the paper compares (section 4.1.2), each a value of ``system:``.

One graph of stages holds them all; a system is the kinds of stages that take part in it. Without
mix and finetuning what is left of Branch-Train-MiX is Branch-Train-Merge; with a mix of copies of
the seed alone it is sparse upcycling; with neither experts nor mix it is the dense baseline.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_btx.errors import UserError
from megatron_btx.recipe.messages import guess
from megatron_btx.recipe.schema import Recipe
from megatron_btx.recipe.stages import expert_stage

SYSTEMS: dict[str, tuple[str, ...]] = {
    "seed": ("prepare", "seed", "evaluate", "report"),
    "experts": ("prepare", "seed", "expert", "evaluate", "report"),
    "dense": ("prepare", "seed", "dense", "evaluate", "report"),
    "upcycling": ("prepare", "seed", "mix", "finetune", "evaluate", "export", "report"),
    "btm": ("prepare", "seed", "expert", "evaluate", "report"),
    "btx": (
        *("prepare", "seed", "expert", "mix", "finetune", "dense"),
        *("evaluate", "export", "report"),
    ),
}
"""The kinds that take part. ``dense`` stands beside ``btx`` where the recipe has such a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A model of the final table, and the stages that made it after the seed (the seed: itself)."""

    name: str
    models: tuple[str, ...]
    """Stages whose final checkpoints it is: one, but for Branch-Train-Merge."""
    made_by: tuple[str, ...]


def kinds(recipe: Recipe) -> tuple[str, ...]:
    """The kinds of stages of a recipe."""
    absent = {"dense"} if recipe.dense is None else set()
    if recipe.export.format == "none":
        absent.add("export")
    return tuple(kind for kind in SYSTEMS[recipe.system] if kind not in absent)


def rows(recipe: Recipe) -> tuple[TableRow, ...]:
    """The rows of the recipe's table; the last is the system itself."""
    taking_part = kinds(recipe)
    experts: tuple[str, ...] = ()
    found = [TableRow(name="seed", models=("seed",), made_by=("seed",))]
    if "expert" in taking_part:
        experts = tuple(map(expert_stage, recipe.experts))
        found += [TableRow(name=name, models=(name,), made_by=(name,)) for name in experts]
    if "dense" in taking_part:
        found.append(TableRow(name="dense", models=("dense",), made_by=("dense",)))
    if recipe.system == "btm":
        models = (*experts, "seed") if recipe.mix.include_seed else experts
        found.append(TableRow(name="btm", models=models, made_by=experts))
    if "finetune" in taking_part:
        made_by = (*experts, "finetune")
        found.append(TableRow(name=recipe.system, models=("finetune",), made_by=made_by))
    return tuple(found)


def row_of(recipe: Recipe, name: str) -> TableRow:
    """A row of the run's table: by its name, or its stage's; without one the system itself.

    Raises:
        UserError: there is none, or it is no single model.
    """
    found = rows(recipe)
    row = next((r for r in found if name in (r.name, *r.models[: len(r.models) == 1])), None)
    if not name:
        row = found[-1]
    if row is None:
        names = [row.name for row in found]
        fix = f"use one of {', '.join(names)}"
        near = [one for one in names if one.partition(":")[2] == name.removeprefix("expert-")]
        fix = f"did you mean {near[0]}? {fix}" if near else fix + guess(name, names)
        raise UserError(f"--stage {name}", "this run has no such model", fix)
    if len(row.models) > 1 and recipe.btm.method != "average":
        what = f"is a set of models ({recipe.btm.method}), which no one directory holds"
        raise UserError(f"--stage {row.name}", what, f"give one: {', '.join(row.models)}")
    return row
