"""The two scripts of tools/convert, as they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from megatron_btx.families import open_hf
from megatron_btx.families.export import write_hf
from megatron_btx.mix.copy import copy
from megatron_btx.weights.source import read_whole
from tests.weights.models import dense

TOOLS = Path(__file__).parents[2] / "tools" / "convert"


def convert(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_there_and_back(tmp_path):
    model = dense("a", 1)
    write_hf(copy(model, dtype=torch.float32), tmp_path / "hf")
    assert convert("hf_to_megatron.py", tmp_path / "hf", tmp_path / "megatron").returncode == 0
    done = convert("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert done.returncode == 0
    back = open_hf(tmp_path / "back", "back")
    for name in model.tensors:
        assert torch.equal(read_whole(back.source, name), read_whole(model.source, name)), name
    again = convert("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert again.returncode == 2
    assert "exists already" in again.stderr
