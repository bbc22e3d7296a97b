"""``btx verify``: whether a checkpoint is what was written, and a mix what its rules say.

Every file is compared with ``hashes.json``. A result of ``btx mix`` is also computed again by
another path: what must be in it comes from ``mix.json``, the model that it describes must be that
one, its sources those that were mixed (SHA-256), and nothing of plans, expressions or the executor
is used: tensors are read whole (mix/reference/reader.py) and every rule is written out once more
(mix/reference/rules.py), in float64 over whole tensors.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_btx.errors import UserError, shown
from megatron_btx.families.family import computed
from megatron_btx.families.hf import read_config
from megatron_btx.files import read_json
from megatron_btx.mix.reference.reader import names_of, open_plain
from megatron_btx.mix.reference.rules import Rules, nearest
from megatron_btx.recipe.read_architecture import from_manifest
from megatron_btx.weights.card import Claim, record
from megatron_btx.weights.file_hashes import HASHES, difference, files_of, hashes_of
from megatron_btx.weights.find_checkpoint import is_hugging_face
from megatron_btx.weights.manifest import read_manifest

_UNREADABLE = (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError)
"""What a tensor raises that is stored twice, or in an archive that torch cannot read."""
_DESCRIPTIONS = ("config.json", "manifest.json")
_MOST = 20
"""Lines of one kind; the number of the rest follows."""


def show(result: Path, out: TextIO, *, keep: bool = False) -> int:
    """Print everything that is not as it should be; 0 where nothing is, else 1.

    Args:
        result: a directory that was written here.
        out: where to.
        keep: put what was found into its ``verification.json`` and card, where all is right.

    Raises:
        UserError: there is neither a ``mix.json`` nor a ``hashes.json``, or it is damaged; or there
            is no ``verification.json`` to put it into.
    """
    lineage = _lineage(result)
    hashes = hashes_of(result)
    if lineage is None and not hashes:
        what = f"no lineage to verify (mix.json), and no {HASHES}"
        raise UserError(str(result), what, "give a directory that btx mix, run or export wrote")
    faults = _files(result, hashes)
    if hashes:
        right = len(hashes) - sum(fault.startswith("changed") for fault in faults)
        out.write(f"{result}: {right} of {len(hashes)} files are what was written\n")
    figure = {"files": len(hashes)}
    if lineage is not None:
        wrong, figure["tensors"] = _mix(result, lineage, out)
        faults += wrong
    _write(faults, out)
    if keep and not faults:
        what = "every file is what was written"
        if lineage is not None:
            what += ", and every tensor is what another path computes from the sources"
        record(result, Claim(claim=what, figure=figure, command="btx verify ."))
    return 1 if faults else 0


def _lineage(result: Path) -> dict[str, Any] | None:
    path = result / "mix.json"
    return read_json(path) if os.path.lexists(path) else None


def _files(result: Path, hashes: Mapping[str, str]) -> list[str]:
    """Files that are not what was written, and weights that were not written with them."""
    faults = [
        f"changed: {shown(name)}: {error.what}"
        for name in hashes
        if (error := difference(result / name, hashes[name]))
    ]
    more = [name for name in files_of(result) if name not in hashes] if hashes else []
    weights = [name for name in more if name.endswith((".safetensors", ".distcp"))]
    return faults + [f"unexpected: {shown(name)}: {HASHES} does not name it" for name in weights]


def _mix(result: Path, lineage: Mapping[str, Any], out: TextIO) -> tuple[list[str], int]:
    """The faults, and how many tensors there should be."""
    try:
        faults = [*_description(result, lineage), *_sources(lineage)]
        verdicts = dict(compare(result, lineage))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"damaged, or of another version: {error!r}"
        raise UserError(str(result / "mix.json"), what, "mix the sources again") from error
    wrong = [f"{verdict}: {shown(name)}" for name, verdict in verdicts.items() if verdict]
    expected = [name for name, verdict in verdicts.items() if verdict != "unexpected"]
    right = sum(not verdicts[name] for name in expected)
    out.write(f"{result}: {right} of {len(expected)} tensors agree\n")
    return faults + wrong, len(expected)


def _description(result: Path, lineage: Mapping[str, Any]) -> Iterator[str]:
    """In what the model that the result's files describe is not the one that was mixed."""
    wanted = from_manifest(lineage["architecture"], result / "mix.json")
    if is_hugging_face(result):
        family, found, _ = read_config(result)
        mine, theirs = computed(family.stored(wanted)), computed(found)
    else:
        mine, theirs = (
            {**asdict(one), **asdict(one.model)} for one in (wanted, read_manifest(result)[0])
        )
        del mine["model"], theirs["model"]
    for name, value in mine.items():
        if theirs[name] != value:
            yield f"described: {name} is {theirs[name]}, not {value} as it was mixed"


def _sources(lineage: Mapping[str, Any]) -> Iterator[str]:
    """Sources that are not those that were mixed."""
    for source in lineage["sources"]:
        label, there = f"source {shown(source['name'])}", Path(source["path"])
        for path in sorted(there.iterdir()) if there.is_dir() else ():
            says = path.suffix in (".safetensors", ".distcp") or path.name in _DESCRIPTIONS
            if says and path.name not in source["sha256"]:
                yield f"{label}: {shown(path)} is not among the files that were mixed"
        for name, wanted in source["sha256"].items():
            path = there / name
            if not path.is_file():
                yield f"{label}: {shown(path)} is missing"
            elif _sha256(path) != wanted:
                yield f"{label}: {shown(path)} has changed since it was mixed"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def compare(result: Path, lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every tensor that should be in the result, or is, by its Hugging Face name; with what is
    wrong with it: ``missing``, ``differs``, ``unexpected``, or nothing.

    Bit for bit, but for a sum that lies within fp64's own rounding of where the result's dtype
    rounds the other way: the order of additions is free.

    Raises:
        UserError: the sources are not there any more.
    """
    rules = Rules(lineage)
    declared = lineage["architecture"]
    made = open_plain(result, declared)
    names = names_of(declared, shared=made.model_type == "qwen2_moe")
    for name in names:
        try:
            got = made.get(name)
        except (KeyError, FileNotFoundError):
            yield name, "missing"
        except _UNREADABLE:
            yield name, "differs"
        else:
            same = got.dtype == rules.dtype and _agrees(got, _wanted(rules, name, got))
            yield name, "" if same else "differs"
    for stray in made.strays(names, declared):
        verdict, _, name = stray.partition(": ")
        yield (name, verdict) if verdict == "unexpected" else (stray, "unexpected")


def _wanted(rules: Rules, name: str, got: torch.Tensor) -> torch.Tensor:
    # Qwen2-MoE has a shared expert; one that no source has is of zeros, under a gate of ones.
    if ".shared_expert" not in name or rules.models[0].has(name):
        return rules.tensor(name)
    return torch.full_like(got, float(".shared_expert_gate" in name))


def _agrees(got: torch.Tensor, want: torch.Tensor) -> bool:
    if want.shape != got.shape:
        return False
    values = [want]
    if want.dtype is torch.float64:
        slack = 1e-14 * float(want.abs().max())
        values += [want - slack, want + slack]
    same = torch.zeros(got.shape, dtype=torch.bool)
    for value in values:  # torch's own rounding too, twice from fp64, as results once were
        same |= (got == nearest(value, got.dtype)) | (got == value.to(got.dtype))
    return bool(same.all())


def _write(faults: Iterable[str], out: TextIO) -> None:
    """The faults by kind, of each kind the first."""
    kinds: dict[str, list[str]] = {}
    for fault in faults:
        kinds.setdefault(fault.split(" ")[0], []).append(fault)
    for lines in kinds.values():
        out.writelines(line + "\n" for line in lines[:_MOST])
        if len(lines) > _MOST:
            out.write(f"and {len(lines) - _MOST} more like these\n")
