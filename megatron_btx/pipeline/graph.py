"""A recipe's stages and what each one waits for. Data, and free of torch.

One graph holds all systems (recipe/systems.py): a system is the kinds of stages that take part,
and what a stage needs of other kinds is left out. Experts of zero tokens are linked to the seed.

Every stage has a key: the hash of its own part of the recipe, of the text it reads and of the keys
of the models it starts from. A stage is done when ``done.json`` in its directory holds this key.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.pipeline.fingerprint import Memo
from megatron_btx.recipe import systems
from megatron_btx.recipe.load import digest
from megatron_btx.recipe.schema import Layout, Recipe, Training
from megatron_btx.recipe.stages import (
    MixturePart,
    boundaries,
    expert_stage,
    flops,
    reads,
    reads_all,
    training,
)

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
"""Kinds that make nothing: one rank finds out in seconds what another stage would meet at its
start, before that one waits for its nodes. They have that stage's key, are done when it is, and
nothing reads what they leave. (The weights are mixed where they are trained, each rank its part.)
"""

TRAINED = ("seed", "expert", "finetune", "dense")
"""Kinds that train a model; so does ``import``, which takes a finished one in a stage's place."""

OWN: dict[str, Callable[[Recipe], Any]] = {
    "export": lambda recipe: recipe.export,
    "report": lambda recipe: None,
}
"""What decides the result of a stage beside what it waits for, where the recipe alone says it."""

_EXECUTION = frozenset(
    [
        "layout",
        "save_interval",
        "async_save",
        "keep_checkpoints",
        "eval_interval",
        "eval_tokens",
        "check_replicas_interval",
        "data",
        "from_",
        "reset_position_ids",
    ]
)
"""Fields of ``Training`` outside its key. The layout is how, not what: a run moved to other
machines goes on from its checkpoints and repeats nothing. ``data`` and ``from`` enter by content;
position ids change nothing.
"""


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
    """Estimated training FLOPs a core: what should be started first (local/runner.py)."""

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

    Reads the files that the recipe names (fingerprint.py), writes nothing.
    """
    keys = _Keys(recipe, memo or Memo())
    stages: dict[str, Stage] = {}
    for stage in outline(recipe):
        stages[stage.name] = dataclasses.replace(stage, key=keys.stage(stage, stages))
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


def imported(recipe: Recipe, name: str) -> str | None:
    """Where the model of stage ``name`` is taken from instead of being trained: a checkpoint
    directory, the name of another stage (an expert of zero tokens is the seed), or nowhere."""
    block = training(recipe, name)
    if block.from_ is not None:
        return block.from_
    return "seed" if name.startswith("expert:") and block.tokens == 0 else None


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


class _Keys:
    """Content hashes. A model's key holds the text of the domains it reads, not the key of
    ``prepare``: otherwise one more document about mathematics would retrain the seed."""

    def __init__(self, recipe: Recipe, memo: Memo) -> None:
        self.recipe, self.memo = recipe, memo
        # Made together, each without what is held out of another: one size changes them all.
        builtin = sorted((str(d.builtin), d.builtin_bytes) for d in recipe.domains.values())
        self._text = {
            name: digest(
                [
                    dataclasses.replace(domain, train=(), valid=()),
                    memo.paths(domain.train),
                    memo.paths(domain.valid),
                    *([builtin] if domain.builtin is not None else []),
                ]
            )
            for name, domain in recipe.domains.items()
        }
        self._tokenizer = digest(self._tokenizer_part())

    def _tokenizer_part(self) -> list[Any]:
        recipe = self.recipe
        if recipe.tokenizer.path is not None:
            return [recipe.tokenizer.type, self.memo.paths([recipe.tokenizer.path])]
        if recipe.seed.from_ is not None:  # it comes along with the seed
            return [self.source(recipe.seed.from_)]
        return [recipe.tokenizer, recipe.random_seed, self._mixture(recipe.seed.data, False)]

    def _mixture(self, data: dict[str, float], tokenized: bool = True) -> list[Any]:
        """Weights and content of the domains that are read."""
        rows = [[name, weight, self._text.get(name)] for name, weight in data.items() if weight]
        return [self._tokenizer, rows] if tokenized else rows

    def source(self, directory: str) -> list[Any]:
        """What identifies a checkpoint that is taken as it is."""
        return ["from", self.memo.paths([str(Path(directory))])]

    def stage(self, stage: Stage, before: dict[str, Stage]) -> str:
        name = kind = LOOKS_AHEAD.get(stage.kind, stage.kind)
        if kind == stage.kind:
            name = stage.name
        apart = ("prepare", *LOOKS_AHEAD)  # the text enters by content, and a look makes nothing
        models = [[need, before[need].key] for need in stage.needs if need not in apart]
        part = [name, self.recipe.random_seed, self._own(name, kind), models]
        return digest(part)

    def _own(self, name: str, kind: str) -> Any:
        recipe = self.recipe
        if kind == "prepare":
            return [list(self._text.items()), self._tokenizer]
        if kind == "import":
            source = imported(recipe, name)
            assert source is not None
            return [recipe.model, "seed" if source == "seed" else self.source(source)]
        if kind == "evaluate":
            how = [recipe.system, recipe.btm if recipe.system == "btm" else None]
            marks = [["boundaries", *boundaries(recipe)]] if any(boundaries(recipe)) else []
            text = list(self._text.items())
            return [how, recipe.evaluate.tokens, self._tokenizer, text, *marks]
        if kind in OWN:
            return OWN[kind](recipe)
        block = training(recipe, name)
        moe = kind == "finetune" or block.anchor is not None
        own = [recipe.model, self._training(block, moe=moe)]
        if block.anchor is not None:
            own += [recipe.routing]
        if kind == "finetune":
            mix = dataclasses.replace(recipe.mix, centroids=None)  # it enters by content
            centroids = [] if recipe.mix.centroids is None else [recipe.mix.centroids]
            own += [mix, self.memo.paths(centroids), recipe.routing]
        if reads_all(recipe, name):  # it reads what the others read
            own += [self._part(part) for group in reads(recipe, name) for part in group]
        return own

    def _part(self, part: MixturePart) -> list[Any]:
        block = part.block
        return [part.stage, block.tokens, block.global_batch_size, self._mixture(block.data)]

    def _training(self, block: Training, moe: bool) -> list[Any]:
        plain = {name: getattr(Training(), name) for name in _EXECUTION}
        if block.average_last > 1:  # of what is saved
            plain["save_interval"] = block.save_interval
        if not moe:  # how a batch is cut matters only to what is counted over a micro-batch:
            plain["micro_batch_size"] = 1  # the balance loss and Switch's capacity
        return [dataclasses.replace(block, **plain), self._mixture(block.data)]
