"""YAML -> the frozen dataclasses of schema.py, and back.

The reader follows the types of the schema, so a new field needs no line here. It collects every
problem before it raises, each with file, line, key and fix.

Five conveniences, all resolved on reading (``dump`` writes the result out in full):

- ``training:`` at the top gives defaults that every stage inherits key by key; the blocks inside
  (``layout``, ``megatron``) merge, a mixture (``data``) is one value and replaces.
- ``"*":`` in ``experts`` gives defaults that every expert inherits in the same way.
- ``base: other.yaml`` starts from another recipe, key by key in the same way; an expert, a domain
  or another entry of a mapping that is null here is left out.
- ``steps: 200`` says the tokens of a stage by its batch and sequence length.
- Counts may be written ``4_000_000``, ``4e6``, ``60k``, ``4M`` or ``80B``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from megatron_btx.errors import UserError, notice, shown
from megatron_btx.recipe import check, stages
from megatron_btx.recipe.fields import Range, beside
from megatron_btx.recipe.messages import homes, path_problem, yaml_name
from megatron_btx.recipe.read_architecture import stated_vocabulary
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.typed import BAD, Reader, since_null
from megatron_btx.recipe.yaml_tree import EXPONENT, Node, parse_tree, read_tree


def load_recipe(path: str | Path, base: str | Path | None = None) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: the file.
        base: a recipe that takes the place of the one named by ``base:`` in it.

    Raises:
        UserErrors: everything that is wrong with it, at once.
    """
    tree = read_tree(Path(path))
    if base is not None:
        return _build([*_with_bases(read_tree(Path(base)), ()), tree])
    return _where_it_lies(_build(_with_bases(tree, ())), Path(path).absolute())


def _where_it_lies(recipe: Recipe, path: Path) -> Recipe:
    """The recipe that a run keeps in its directory, of that directory: the run may have been moved
    or copied since."""
    here, said = path.parent, Path(recipe.run_dir)
    if path.name != KEPT or not is_run(here) or (said.exists() and here.samefile(said)):
        return recipe
    return dataclasses.replace(recipe, run_dir=str(here))


KEPT = "recipe.yaml"
"""What a run's copy of its recipe is called."""


def is_run(directory: Path) -> bool:
    """Whether a run has been begun in a directory."""
    return (directory / "lock").exists() or any(directory.glob("*/stage.json"))


def parse_recipe(text: str, path: str | Path = "recipe.yaml") -> Recipe:
    """The recipe in a YAML text; ``path`` is what errors name and relative paths start from."""
    return _build(_with_bases(parse_tree(text, Path(path)), ()))


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default resolved; ``parse_recipe(dump(r)) == r``."""
    return yaml.dump(_plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that is a number for us and, without a point, none for PyYAML: 1e5."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "'" if EXPONENT.fullmatch(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def dump_kept(recipe: Recipe, run_dir: Path) -> str:
    """``dump`` for the run's directory: it says the same wherever it is read from."""
    share = tuple(os.path.abspath(path) for path in recipe.share)
    return dump(dataclasses.replace(recipe, run_dir=str(run_dir.absolute()), share=share))


def digest(part: Any) -> str:
    """Content hash (sha256, hex) of a dataclass, or of plain values around some.

    Equal content gives an equal hash on every machine. The order of a mapping counts: the order of
    ``experts`` is the order of the MoE's experts. A field at its default does not count, so that a
    new option leaves the hash of what was made before it as it was; who changes what a default
    means gives the field another name.
    """
    plain = _plain(part, written=_differs, entry=_hashed)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A file's name may be no UTF-8: Python has lone surrogates for its bytes.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def different(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values, without fields at their defaults."""
    found: dict[str, Any] = _plain(recipe, written=_differs)
    return found


WHERE_IT_RUNS = ("run_dir", "share", "slurm", "wandb", "max_parallel_jobs", "hang_minutes")
"""Keys that decide where and how a recipe runs, and nothing of its result."""


def changes(before: Recipe, after: Recipe) -> list[str]:
    """The keys whose values decide a result and differ: ``finetune.lr: 0.001 -> 0.002``."""
    old, new = ({**_plain(one), **dict.fromkeys(WHERE_IT_RUNS)} for one in (before, after))
    return list(_changes(old, new, ""))


def _changes(old: Any, new: Any, key: str) -> Iterator[str]:
    """Of two values; of mappings, part by part."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            yield from _changes(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield f"{key}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a block"
    return "nothing" if value in (None, []) else shown(value, 60)


def _hashed(field: Any, value: Any) -> tuple[str, Any]:
    """A field in hashes: by its first name, whatever it is called now."""
    if "hashed" in field.metadata:
        name, value = field.metadata["hashed"](value)
        return name, value
    return str(field.metadata.get("formerly") or yaml_name(field.name)), value


def _plain(
    value: Any,
    written: Callable[[Any, Any], bool] = lambda value, field: True,
    entry: Callable[[Any, Any], tuple[str, Any]] = lambda field, value: (
        yaml_name(field.name),
        value,
    ),
) -> Any:
    """Dataclasses as mappings, of those fields that ``written(value, field)`` admits."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = [
            entry(field, getattr(value, field.name))
            for field in dataclasses.fields(value)
            if written(getattr(value, field.name), field)
        ]
        return {key: _plain(item, written, entry) for key, item in entries}
    if isinstance(value, dict):
        return {key: _plain(item, written, entry) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, written, entry) for item in value]
    return value


def _differs(value: Any, field: Any) -> bool:
    """Whether a field says something else than its default."""
    if field.default is not dataclasses.MISSING:
        return bool(value != field.default)
    if field.default_factory is not dataclasses.MISSING:
        return bool(value != field.default_factory())
    return True


def _with_bases(tree: Node, seen: tuple[Path, ...]) -> list[Node]:
    """The tree behind those it starts from: a later one wins key by key."""
    base = tree.value.get("base")
    if base is None:
        return [tree]
    if not isinstance(base.value, str):
        raise UserError(base.where, f"is {base.kind}, not a path", "base: other.yaml")
    wrong = path_problem(base.value)
    if wrong is not None:
        raise UserError(base.where, wrong, "base: other.yaml")
    assert tree.file is not None
    seen = (*seen, tree.file.resolve())
    path = tree.file.parent / os.path.expanduser(base.value)
    if path.resolve() in seen:
        raise UserError(base.where, f"{base.value} starts from this recipe", "remove one `base:`")
    return [*_with_bases(read_tree(path), seen), tree]


def _build(layers: list[Node]) -> Recipe:
    builder = _Builder(noun="a recipe", homes=homes(Recipe), roots=layers)
    recipe = builder.instance(Recipe, layers, "", extra=("training", "base"))
    if recipe is not BAD:
        recipe = _derive(builder.with_steps(recipe))
        builder.check(recipe)
        builder.look_for_tokens(recipe)
        if not builder.errors:
            recipe = _anchored(builder.match_dense(recipe), builder)
    builder.raise_errors()
    return recipe


def _derive(recipe: Recipe) -> Recipe:
    """Fill in what follows from the rest: the run's directory, an expert's own domain."""
    experts = {
        name: expert
        if expert.data or name not in recipe.domains
        else dataclasses.replace(expert, data={name: 1.0})
        for name, expert in recipe.experts.items()
    }
    run_dir = recipe.run_dir.replace("{name}", recipe.name)
    tokenizer, seed = recipe.tokenizer, recipe.seed.from_
    if seed is not None and tokenizer.path is None:
        givers = stages.taken(recipe).values() if recipe.mix.align_vocab else [seed]
        sizes = [size for path in givers if (size := stated_vocabulary(Path(path))) is not None]
        tokenizer = dataclasses.replace(
            tokenizer, vocab_size=max(sizes, default=tokenizer.vocab_size)
        )
    return dataclasses.replace(recipe, experts=experts, run_dir=run_dir, tokenizer=tokenizer)


def _anchored(recipe: Recipe, builder: _Builder) -> Recipe:
    """The recipe with its run directories where they are: from the file that names them, as its
    other paths; the default from the recipe itself."""

    def file(key: str) -> Path | None:
        return builder.marks.get(key, builder.roots[-1]).file

    share = tuple(beside(path, file("share"), "share") for path in recipe.share)
    run_dir = beside(recipe.run_dir, file("run_dir"), "run_dir")
    return dataclasses.replace(recipe, run_dir=run_dir, share=share)


STEPS = Range(1, 10**9)
_EVERY = "*"
"""What stands under it in ``experts`` holds for every expert."""


@dataclasses.dataclass(kw_only=True)
class _Builder(Reader):
    """Reads a recipe: every stage starts from ``training:``."""

    roots: list[Node]
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    """Of stages that say so instead of tokens, by their dotted keys."""

    def check(self, recipe: Recipe) -> None:
        """Note what check.py finds, except in blocks that have an error of their own already: what
        it found there may be about the default that stands in for the mistaken value."""
        broken = {node.key.split(".")[0] for node, _ in self.errors}
        for key, what, fix in check.problems(recipe):
            near, node = key, self.marks.get(key)
            while node is None and near:
                near = near.rpartition(".")[0]
                node = self.marks.get(near) if near else self.roots[-1]
            assert node is not None
            written = node.key + key.removeprefix(near)
            if not broken & {written.split(".")[0], key.split(".")[0]}:
                self.error(Node(None, node.file, node.line, written), what, fix)

    def look_for_tokens(self, recipe: Recipe) -> None:
        """An expert that is not trained says so: forgotten, it would be a copy of the seed."""
        for name, expert in recipe.experts.items():
            key = f"experts.{name}"
            told = f"{key}.tokens" in self.marks or key in self.steps
            if expert.from_ is None and not told and key in self.marks:
                where = dataclasses.replace(self.marks[key], value=None, key=f"{key}.tokens")
                fix = "add `tokens:` or `steps:`, or `from: DIR`; `tokens: 0` is a copy of the seed"
                self.error(where, "is missing", fix)

    def match_dense(self, recipe: Recipe) -> Recipe:
        """Give the dense baseline the tokens of all it is compared with. Its mixtures are those of
        ``stages.reads``; what ``training:`` says about either is not meant for it."""
        if recipe.dense is None:
            return recipe
        tokens = stages.matched_tokens(recipe)["dense"]
        for name, right in (
            ("steps", False),
            ("tokens", recipe.dense.tokens == tokens),
            ("data", not recipe.dense.data),
        ):
            node = self.marks.get(f"dense.{name}")
            if node is not None and node.key.startswith("dense") and not right:
                what = "is derived: the experts' data and then the finetuning's, token by token"
                self.error(node, what, "remove it")
        return dataclasses.replace(
            recipe, dense=dataclasses.replace(recipe.dense, tokens=tokens, data={})
        )

    def block(self, cls: Any, layers: list[Node], key: str) -> Any:
        """A block; one of training has under it what ``training:`` says."""
        if cls is Training:
            above = since_null([r.value["training"] for r in self.roots if "training" in r.value])
            if key.startswith("experts."):
                every = [node.value[_EVERY] for node in self._experts() if _EVERY in node.value]
                above += since_null(every)
            layers = [*above, *layers]
        return super().block(cls, layers, key)

    def _experts(self) -> list[Node]:
        """The blocks of experts, of each file one."""
        given = [root.value["experts"] for root in self.roots if "experts" in root.value]
        return [node for node in given if isinstance(node.value, dict)]

    def _mapping(self, hint: Any, last: Node, layers: list[Node], key: str) -> Any:
        """A mapping; of experts ``*`` is none, but what all of them begin with."""
        if key == "experts":
            layers = [
                dataclasses.replace(
                    layer, value={name: n for name, n in layer.value.items() if name != _EVERY}
                )
                if isinstance(layer.value, dict)
                else layer
                for layer in layers
            ]
        return super()._mapping(hint, last, layers, key)

    def instance(self, cls: type, layers: list[Node], key: str, extra: tuple[str, ...] = ()) -> Any:
        """A dataclass; a training stage may give ``steps`` instead of tokens."""
        if cls is Training:
            layers = self._take_steps([self._take_freeze_experts(one) for one in layers], key)
            extra = (*extra, "steps")
        return super().instance(cls, layers, key, extra)

    def _take_freeze_experts(self, layer: Node) -> Node:
        """A layer with ``freeze: [experts]`` for what said so before."""
        entries = dict(layer.value)
        node = entries.pop("freeze_experts", None)
        if node is None:
            return layer
        if not isinstance(node.value, bool) or "freeze" in entries:
            self.error(node, "is `freeze: [experts]` now", "write that, and remove it")
        elif node.value:
            notice(f"{node.where} is `freeze: [experts]` now; this release reads both")
            entries["freeze"] = dataclasses.replace(node, value="experts")
        return dataclasses.replace(layer, value=entries)

    def _take_steps(self, layers: list[Node], key: str) -> list[Node]:
        """The layers without ``steps``; of tokens and steps the later layer's counts."""
        given: Node | None = None
        rest = []
        for layer in layers:
            entries = dict(layer.value)
            written = "steps" in entries or "tokens" in entries
            steps, tokens = entries.pop("steps", None), entries.get("tokens")
            if steps is not None and steps.value is None:  # as if it were not there
                steps = None
            if steps is not None and tokens is not None and tokens.value is not None:
                self.error(steps, "stands beside `tokens`", "give one of the two")
            if written:
                given = steps
            rest.append(dataclasses.replace(layer, value=entries))
        if given is not None:
            count = self.value(int, [given], f"{key}.steps")
            wrong = None if count is BAD else STEPS.problem(count)
            if wrong is not None:
                count = self.error(given, *wrong)
            if count is not BAD:
                self.steps[key] = count
        return rest

    def with_steps(self, recipe: Recipe) -> Recipe:
        """The recipe with the tokens of those stages."""

        def counted(key: str, block: Training) -> Training:
            if key not in self.steps:
                return block
            tokens = self.steps[key] * block.global_batch_size * recipe.model.seq_length
            return dataclasses.replace(block, tokens=tokens)

        blocks = {key: counted(key, block) for key, block in check.stages(recipe).items()}
        experts = {name: blocks[f"experts.{name}"] for name in recipe.experts}
        own: dict[str, Any] = {key: blocks[key] for key in blocks if "." not in key}
        return dataclasses.replace(recipe, experts=experts, **own)
