"""The public names: lazy, without torch, typed, and documented in docs/api.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_btx
from tests.families.made import make

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = [name for names in megatron_btx.API.values() for name in names]


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, megatron_btx\n"
        "megatron_btx.load_recipe, megatron_btx.plan, megatron_btx.Routing\n"
        "heavy = {'torch', 'numpy', 'megatron', 'wandb'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_with_a_docstring_and_on_the_page(name: str) -> None:
    assert getattr(megatron_btx, name).__doc__
    assert re.search(rf"`{name}\b", PAGE), f"docs/api.md does not name {name}"


def test_the_stub_names_the_same() -> None:
    stub = Path(megatron_btx.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    found: dict[str, set[str | None]] = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {alias.asname for alias in node.names}
            found.setdefault(node.module.partition(".")[2], set()).update(names)
    assert found == {module: set(names) for module, names in megatron_btx.API.items()}


def test_another_name_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tokens'"):
        _ = megatron_btx.tokens


def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    directories = {}
    for name in ("code", "math"):
        directories[name] = tmp_path / name
        make("llama", directories[name])
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    exec(blocks[0], {"directories": directories, "folder": tmp_path})
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "mixtral")
    assert (config.model_type, config.num_local_experts) == ("mixtral", 2)
