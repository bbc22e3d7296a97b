"""The two scripts of tools/convert, as they are used."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from megatron_btx.families import open_hf
from megatron_btx.families.export import write_hf
from megatron_btx.mix.copy import copy
from megatron_btx.weights.source import read_whole
from tests.weights.models import dense

TOOLS = Path(__file__).parents[2] / "tools" / "convert"


@pytest.fixture
def convert(monkeypatch):
    """Run a script of tools/convert; its exit code."""
    monkeypatch.syspath_prepend(str(TOOLS))

    def run(script: str, *words: object) -> object:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
        return left.value.code

    return run


def test_there_and_back(tmp_path, convert, capsys):
    model = dense("a", 1)
    write_hf(copy(model, dtype=torch.float32), tmp_path / "hf")
    assert convert("hf_to_megatron.py", tmp_path / "hf", tmp_path / "megatron") == 0
    assert convert("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back") == 0
    back = open_hf(tmp_path / "back", "back")
    for name in model.tensors:
        assert torch.equal(read_whole(back.source, name), read_whole(model.source, name)), name
    assert convert("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back") == 2
    assert "exists already" in capsys.readouterr().err
