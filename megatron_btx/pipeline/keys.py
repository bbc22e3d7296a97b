"""The key of a stage, which decides whether it is done: the hash of its own part of the recipe, of
the text that it reads and of the keys of the models that it starts from.

Text counts by the content of its files. A file counts by its size and a hash: of all of it up to
16 MiB, of sixteen evenly spaced blocks of 1 MiB above that, so that terabytes of text take seconds.
A memo beside the run remembers the hash of every file whose size and time of change are as they
were; a process reads no file twice, whatever memos it asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_btx.data.formats.part import pair_files
from megatron_btx.families.tokenizer_settings import files_beside
from megatron_btx.files import written
from megatron_btx.recipe.load import digest
from megatron_btx.recipe.schema import Recipe, Training
from megatron_btx.recipe.stages import (
    MixturePart,
    boundaries,
    imported,
    reads,
    reads_all,
    taken,
    training,
)

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


class StageKeys:
    """The keys of a recipe's stages. A model's key holds the text of the domains it reads, not the
    key of ``prepare``: otherwise one more document about mathematics would retrain the seed.

    Args:
        recipe: the run's.
        memo: of the hashes of the files that it names.
    """

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
            given = Path(recipe.tokenizer.path)
            files = [given, *files_beside(given)]
            return [recipe.tokenizer.type, self.memo.paths(list(map(str, files)))]
        if recipe.mix.align_vocab:
            return self._aligned()
        if recipe.seed.from_ is not None:  # it comes along with the seed
            return [self.source(recipe.seed.from_)]
        return [recipe.tokenizer, recipe.random_seed, self._mixture(recipe.seed.data, False)]

    def _aligned(self) -> list[Any]:
        """Of each model that gives rows to the others."""
        return [[name, self.source(path)] for name, path in taken(self.recipe).items()]

    def _mixture(self, data: dict[str, float], tokenized: bool = True) -> list[Any]:
        """Weights and content of the domains that are read."""
        rows = [[name, weight, self._text.get(name)] for name, weight in data.items() if weight]
        return [self._tokenizer, rows] if tokenized else rows

    def source(self, directory: str) -> list[Any]:
        """What identifies a checkpoint that is taken as it is."""
        return ["from", self.memo.paths([str(Path(directory))])]

    def key(self, name: str, kind: str, models: Mapping[str, str]) -> str:
        """The key of a stage.

        Args:
            name: of the stage.
            kind: of the stage (a key of ``graph.NEEDS``), or ``import``.
            models: name -> key of the stages whose models it starts from, in their order.
        """
        before = [list(one) for one in models.items()]
        return digest([name, self.recipe.random_seed, self._own(name, kind), before])

    def _own(self, name: str, kind: str) -> Any:
        recipe = self.recipe
        if kind == "prepare":
            return [list(self._text.items()), self._tokenizer]
        if kind == "import":
            source = imported(recipe, name)
            assert source is not None
            if source == "seed":
                return [recipe.model, "seed"]
            aligned = [self._aligned()] if recipe.mix.align_vocab else []
            return [recipe.model, self.source(source), *aligned]
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


_BLOCK = 1 << 20
_BLOCKS = 16


_SEEN: dict[str, list[int | str]] = {}
"""What this process has hashed: path -> size, modification time (ns), hash."""


class Memo:
    """Hashes of files by path, valid while size and modification time (ns) stand."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, list[int | str]] = {}
        self._changed = False
        if path is not None and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                known = None  # an unreadable memo only costs time: the files are hashed again
            entries = known.items() if isinstance(known, dict) else ()
            self._known = {
                name: entry
                for name, entry in entries
                if isinstance(entry, list) and len(entry) == 3
            }

    def file(self, path: Path) -> str:
        """Hash (hex) of a file's size and content."""
        status = path.stat()
        size, changed = status.st_size, status.st_mtime_ns
        entry = self._known.get(str(path))
        if entry is not None and entry[:2] == [size, changed]:
            return str(entry[2])
        place = str(path.absolute())
        if _SEEN.get(place, [])[:2] != [size, changed]:
            _SEEN[place] = [size, changed, _hash(path, size)]
        self._known[str(path)] = list(_SEEN[place])
        self._changed = True
        return str(_SEEN[place][2])

    def paths(self, paths: Sequence[str]) -> list[list[str]]:
        """``[name, hash]`` of every file in ``paths``, directories walked; names are relative to
        what was given, so that moving a corpus changes nothing. A missing file has hash ``""``:
        recipe/check.py reports it."""
        found = []
        for given in map(Path, paths):
            if given.is_dir():
                files = sorted(item for item in given.rglob("*") if _counts(item, given))
                found += [[str(item.relative_to(given)), self.file(item)] for item in files]
            else:
                files = pair_files(given) or [given]
                found += [[item.name, self.file(item) if item.is_file() else ""] for item in files]
        return found

    def save(self) -> None:
        """Write the memo, if it has a place and anything new to say."""
        if self.path is None or not self._changed:
            return
        # Who may not write here, or has no room to, hashes anew the next time.
        with contextlib.suppress(OSError), written(self.path, durable=False) as file:
            json.dump(self._known, file)
        self._changed = False


def _counts(item: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in item.relative_to(root).parts)
    return item.is_file() and not hidden


def _hash(path: Path, size: int) -> str:
    found = hashlib.sha256(f"{size}:".encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _BLOCKS:
            for data in iter(lambda: file.read(_BLOCK), b""):
                found.update(data)
        else:
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return found.hexdigest()
