"""docs/extending.md: its worked examples, run in order."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_btx.families.hf import FAMILIES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def test_every_block_of_the_page_runs(tmp_path: Path) -> None:
    page, names = PAGE.read_text(encoding="utf-8"), {"folder": tmp_path, "__name__": "extending"}
    known = dict(FAMILIES)
    try:
        blocks = list(BLOCK.finditer(page))
        assert len(blocks) >= 4
        for block in blocks:
            line = page[: block.start(1)].count("\n")
            code = compile("\n" * line + block[1], str(PAGE), "exec")  # lines as on the page
            exec(code, names)
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)
