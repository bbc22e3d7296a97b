"""Megatron-LM's older form: shards of TP x PP, written here as `--ckpt-format torch` writes them
(tests/megatron_lm has its own trainer do it)."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.mix.reference.reader import open_plain
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import read_whole
from tests.mix.commands import btx
from tests.weights.models import DENSE, dense
from tests.weights.test_megatron_lm_args import ARGS, Evil

TP, PP = 2, 2


def shard(name: str, tensor: torch.Tensor, tp: int) -> torch.Tensor:
    """Rank ``tp``'s part, as Megatron's layers divide their weights."""
    if name.endswith("linear_fc1.weight"):
        gate, up = tensor.chunk(2)
        return torch.cat([gate.chunk(TP)[tp], up.chunk(TP)[tp]])
    if name.endswith(("linear_qkv.weight", "word_embeddings.weight", "output_layer.weight")):
        return tensor.chunk(TP)[tp].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(TP, 1)[tp].clone()
    return tensor


def write(directory: Path, args: Any = None, *, virtual: int = 1, **content: Any) -> None:
    """A dense model under TP x PP, with ``virtual`` stages on every pipeline rank."""
    sizes = {
        "tensor_model_parallel_size": TP,
        "pipeline_model_parallel_size": PP,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
    }
    for tp in range(TP):
        stages = stages_of(dense("a", 1), tp, PP * virtual)
        for pp in range(PP):
            mine = stages[pp::PP]
            keys = ["model"] if virtual == 1 else [f"model{number}" for number in range(virtual)]
            folder = directory / f"mp_rank_{tp:02d}_{pp:03d}"
            folder.mkdir(parents=True)
            everything = {
                "args": args or argparse.Namespace(**ARGS, **sizes),
                "checkpoint_version": 3.0,
                "iteration": 7,
                **dict(zip(keys, mine, strict=True)),
                "rng_state": [{"np_rng_state": np.random.get_state(), "cpu": torch.ones(3)}],
                "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}},
            }
            torch.save(everything | content, folder / "model_optim_rng.pt")


def stages_of(model: Checkpoint, tp: int, count: int) -> list[Any]:
    """Rank ``tp``'s tensors of each stage, layers counted from its first."""
    per_stage = DENSE.model.num_layers // count
    states: list[Any] = [OrderedDict() for _ in range(count)]
    for name in model.tensors:
        parts = name.split(".")
        stage = 0 if "embed" in name else count - 1
        if name.startswith("decoder.layers."):
            stage, layer = divmod(int(parts[2]), per_stage)
            parts[2] = str(layer)
        states[stage][".".join(parts)] = shard(name, read_whole(model.source, name), tp)
    for state in states:
        state._metadata = OrderedDict(version=1)  # as a module's state has it
        state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    return states


@pytest.mark.parametrize(("name", "virtual"), [("iter_0000007", 1), ("release", 1), ("release", 2)])
def test_shards_of_tp_and_pp_are_one_model(name: str, virtual: int, tmp_path: Path) -> None:
    write(tmp_path / name, virtual=virtual)
    assert find_checkpoint(tmp_path / name) == tmp_path / name
    found, expected = open_megatron(tmp_path / name, "m"), dense("a", 1)
    assert found.architecture == DENSE
    assert found.manifest["tokens"] == 1000 * DENSE.model.seq_length
    assert found.tensors.keys() == expected.tensors.keys()
    for each in expected.tensors:
        assert torch.equal(read_whole(found.source, each), read_whole(expected.source, each)), each
    box = ((3, 9), (1, 2))
    each = "decoder.layers.2.mlp.linear_fc1.weight"
    assert torch.equal(found.source.read(each, box), expected.source.read(each, box))


def test_they_are_mixed(tmp_path: Path) -> None:
    for label in ("code", "seed"):
        write(tmp_path / label)
    (tmp_path / "copies").mkdir()
    sources = [tmp_path / "code", tmp_path / "seed"]
    code, said = btx("mix", "--sources", *sources, "--average", "tokens", "--out", tmp_path / "out")
    assert code == 0, said
    with pytest.raises(UserError, match="mix the copy"):
        open_plain(tmp_path / "code", {})
    words = ["--method", "copy", "--format", "megatron", "--out"]
    for label in ("code", "seed"):
        named = f"{label}={tmp_path / label}"
        code, said = btx("mix", "--sources", named, *words, tmp_path / "copies" / label)
        assert code == 0, said


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "mp_rank_01_000/model_optim_rng.pt: missing"),
        ("truncated", "mp_rank_01_000/model_optim_rng.pt: not what torch.save writes"),
        ("text", "mp_rank_01_000/model_optim_rng.pt: not what torch.save writes"),
    ],
)
def test_a_damaged_shard_is_one_error(damage: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "iter")
    file = tmp_path / "iter" / "mp_rank_01_000" / "model_optim_rng.pt"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"text")
    with pytest.raises(UserError) as caught:
        open_megatron(tmp_path / "iter", "m")
    assert words in str(caught.value)


def test_what_is_divided_otherwise_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "virtual", virtual=2, model1=None)
    with pytest.raises(UserError, match="holds no `model1`, which its arguments speak of"):
        open_megatron(tmp_path / "virtual", "m")
    args = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "num_experts": 4}
    write(tmp_path / "experts", argparse.Namespace(**(ARGS | args)))
    with pytest.raises(UserError, match=r"experts of tensor-parallel size 1"):
        open_megatron(tmp_path / "experts", "m")


def test_a_malicious_shard_is_refused_and_not_run(tmp_path: Path) -> None:
    write(tmp_path / "iter", Evil(tmp_path / "owned"))
    with pytest.raises(UserError, match="which no checkpoint needs: refused"):
        open_megatron(tmp_path / "iter", "m")
    assert not (tmp_path / "owned").exists()
