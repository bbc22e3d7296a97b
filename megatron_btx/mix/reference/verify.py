"""``btx verify``: compute a result again by another path and compare it.

Nothing of plans, expressions or the executor is used: tensors are read whole
(mix/reference/reader.py) and every rule is written out once more (mix/reference/rules.py), in
float64 over whole tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_btx.errors import UserError
from megatron_btx.mix.reference.reader import open_plain
from megatron_btx.mix.reference.rules import Rules


def show(result: Path, out: TextIO) -> int:
    """Print every tensor that differs; 0 where none does."""
    try:
        lineage = json.loads((result / "mix.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"no lineage to verify: {error}"
        raise UserError(str(result), what, "give a directory that btx mix wrote") from error
    wrong, count = [], 0
    for name, same in compare(result, lineage):
        count += 1
        if not same:
            wrong.append(name)
    for name in wrong:
        out.write(f"differs: {name}\n")
    out.write(f"{result}: {count - len(wrong)} of {count} tensors agree\n")
    return 1 if wrong else 0


@torch.no_grad()
def compare(result: Path, lineage: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Every tensor of the result by its Hugging Face name, and whether it is what it should be.

    Bit for bit, but for a sum that lies within fp64's own rounding of where the result's dtype
    rounds the other way: the order of additions is free.

    Raises:
        UserError: the sources are not there any more.
    """
    rules = Rules(lineage)
    made = open_plain(result, lineage["architecture"])
    for name in made.names:
        got = made.get(name)
        # Qwen2-MoE has a shared expert; one that no source has is of zeros.
        is_new = ".shared_expert" in name and name not in rules.models[0].names
        want = torch.zeros_like(got) if is_new else rules.tensor(name)
        values = [want]
        if want.dtype is torch.float64:
            slack = 1e-14 * float(want.abs().max())
            values += [want - slack, want + slack]
        same = torch.zeros(got.shape, dtype=torch.bool)
        for value in values if want.shape == got.shape else ():
            same |= got == value.to(got.dtype)
        yield name, bool(same.all())
