"""docs/extending.md: its worked examples, run in order."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_btx.families.hf import FAMILIES
from megatron_btx.pipeline import graph, keys, worker
from megatron_btx.recipe import systems

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    names = {"folder": tmp_path, "examples": PAGE.parents[1] / "examples", "__name__": "extending"}
    tables = (FAMILIES, graph.NEEDS, keys.OWN, systems.SYSTEMS, worker.KINDS)
    before = [dict(table) for table in tables]
    try:
        blocks = list(BLOCK.finditer(page))
        assert len(blocks) == 5
        for block in blocks:
            line = page[: block.start(1)].count("\n")
            code = compile("\n" * line + block[1], str(PAGE), "exec")  # lines as on the page
            exec(code, names)
    finally:
        for table, was in zip(tables, before, strict=True):
            table.clear()
            table.update(was)
