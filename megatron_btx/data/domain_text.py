"""The files of a domain: which are read for which split, how, and their content hash."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_btx.data.documents import find_files, read_documents
from megatron_btx.data.formats import format_of, token_pair
from megatron_btx.data.shards import HELD_OUT, weigh
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.recipe.schema import Domain, Recipe

SPLITS = ("train", "valid")


@dataclass(frozen=True, slots=True)
class Group:
    """Files that become one .bin/.idx pair, or a pair of the user's."""

    files: tuple[Path, ...]
    path: int
    """Index in ``train:`` or ``valid:`` of the path by which they were found."""
    is_pair: bool
    """Whether it is a Megatron pair of the user's, named by its ``.idx``."""


class DomainText:
    """The documents of one domain.

    Args:
        name: the domain's.
        domain: its block of the recipe.
        found: the files of each path of each split.
        out_dir: the directory of the prepare stage, which holds built-in text.
    """

    def __init__(
        self, name: str, domain: Domain, found: dict[str, list[list[Path]]], out_dir: Path
    ) -> None:
        self.name, self.domain = name, domain
        self.found = found
        if domain.builtin is not None:
            corpus = out_dir / "corpus" / domain.builtin
            self.found = {split: [[corpus / f"{split}.jsonl"]] for split in SPLITS}
        self.is_split = not self.found["valid"]
        self.text_key = "text" if domain.builtin is not None else domain.text_key

    def files(self, split: str) -> list[Path]:
        """All files of a split in order; of a domain without ``valid:``, those of both splits."""
        paths = self.found["train" if self.is_split else split]
        return [file for files in paths for file in files]

    def groups(self, split: str) -> list[Group]:
        """The groups of a split: text files in one, or one per path if the paths have weights;
        every Megatron pair in a group of its own."""
        groups: list[Group] = []
        weighted = bool(self.domain.weights) and (split == "train" or self.is_split)
        text: dict[int, list[Path]] = {}
        for path, files in enumerate(self.found["train" if self.is_split else split]):
            for file in files:
                if format_of(file) is token_pair:
                    groups.append(Group((file,), path, is_pair=True))
                else:
                    text.setdefault(path if weighted else 0, []).append(file)
        groups += [Group(tuple(files), path, is_pair=False) for path, files in text.items()]
        return sorted(groups, key=lambda group: group.path)

    def shares(self, split: str, groups: Sequence[Group], tokens: Sequence[int]) -> list[float]:
        """Each group's share of the domain's samples, from its tokens and the weights of the
        paths."""
        weights = self.domain.weights if split == "train" else ()
        shares = []
        for group, count in zip(groups, tokens, strict=True):
            if weights:
                same = [n for g, n in zip(groups, tokens, strict=True) if g.path == group.path]
                share = weights[group.path] / sum(weights) * count / max(sum(same), 1)
            else:
                share = count / max(sum(tokens), 1)
            shares.append(share)
        return shares

    def documents(self, split: str) -> Iterator[str]:
        """The text of a split.

        Raises:
            UserError: it cannot be read, or consists of token ids.
        """
        documents = read_documents(self.files(split), self.text_key)
        if not self.is_split:
            return documents
        held_out = split == "valid"
        return (text for text in documents if (document_hash(text) % HELD_OUT == 0) is held_out)

    def size(self) -> int:
        """About how many bytes of training text there are."""
        return sum(map(weigh, self.files("train")))

    def sources(self, split: str) -> list[str]:
        """Where it is from, for people."""
        if self.domain.builtin is not None:
            return [f"builtin: {self.domain.builtin}"]
        return [str(file) for file in self.files(split)]

    def key(self, split: str, files: Sequence[Path] | None = None) -> str:
        """What the text depends on: files by name, size and time; built-in text by content."""
        files = self.files(split) if files is None else files
        if self.domain.builtin is not None:
            return digest([_sha256(file) for file in files])
        stats = [_stat(file) for file in files]
        return digest([stats, self.domain.text_key, self.is_split, split])


def texts_of(recipe: Recipe, out_dir: Path) -> dict[str, DomainText]:
    """The text of every domain by its name; of built-in text, where it will be.

    Raises:
        UserErrors: files that are missing.
    """
    found = find(recipe)
    return {
        name: DomainText(name, domain, found[name], out_dir)
        for name, domain in recipe.domains.items()
    }


def find(recipe: Recipe) -> dict[str, dict[str, list[list[Path]]]]:
    """The files of every domain, by split and path.

    Raises:
        UserErrors: all that are missing.
    """
    found: dict[str, dict[str, list[list[Path]]]] = {}
    errors: list[UserError] = []
    for name, domain in recipe.domains.items():
        found[name] = {}
        for split, paths in (("train", domain.train), ("valid", domain.valid)):
            with collect_errors(errors):
                where = f"domains.{name}.{split}"
                found[name][split] = [find_files([path], where=where) for path in paths]
    if not errors:
        errors += _held_out_twice(found)
    if errors:
        raise UserErrors(errors)
    return found


def _held_out_twice(found: dict[str, dict[str, list[list[Path]]]]) -> list[UserError]:
    """Errors for held-out files that are also training files, or copies of one."""
    train: dict[int, list[tuple[str, Path]]] = {}
    for name, splits in found.items():
        for file in chain.from_iterable(splits["train"]):
            train.setdefault(file.stat().st_size, []).append((name, file))
    errors = []
    for name, splits in found.items():
        for file in chain.from_iterable(splits["valid"]):
            for other, same in train.get(file.stat().st_size, []):
                if file.samefile(same) or _equal(file, same):
                    what = "is" if file.samefile(same) else f"has the content of {same},"
                    errors.append(
                        UserError(
                            f"domains.{name}.valid",
                            f"{file} {what} training text of domain {other}",
                            "hold out other text, or leave `valid:` out: one document in "
                            f"{HELD_OUT} is held out then",
                        )
                    )
                    break
    return errors


def _equal(one: Path, other: Path) -> bool:
    ours, theirs = (_content(file) for file in (one, other))
    sizes = ours.stat().st_size == theirs.stat().st_size
    return sizes and filecmp.cmp(ours, theirs, shallow=False)


def _content(file: Path) -> Path:
    """The file with the documents: of a Megatron pair the ``.bin``."""
    return file.with_suffix(".bin") if format_of(file) is token_pair else file


def document_hash(text: str) -> int:
    """A 64-bit hash, which decides whether a document is held out."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def digest(content: Any) -> str:
    """SHA-256 (hex) of values that JSON can represent."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stat(file: Path) -> tuple[str, int, int] | list[tuple[str, int, int]]:
    def of(path: Path) -> tuple[str, int, int]:
        return (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)

    return [of(file), of(file.with_suffix(".bin"))] if file.suffix == ".idx" else of(file)


def _sha256(file: Path) -> str:
    hashed = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
