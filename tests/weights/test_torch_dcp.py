"""Megatron-LM's `torch_dcp` and `fsdp_dtensor`, written by torch.distributed.checkpoint under the
names of the trainer's modules (tests/megatron_lm has the trainer itself write them)."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_btx.errors import UserError
from megatron_btx.families.write_megatron_lm_args import command_line
from megatron_btx.mix.one_model import copy
from megatron_btx.mix.reference.reader import open_plain
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.source import read_whole
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.weights.models import DENSE, dense, moe_plan
from tests.weights.test_megatron_lm_args import ARGS, megatron_lm

LOCAL = {  # how a module names an expert's matrix: the local layers, Transformer Engine's
    "torch_dcp": r"experts.local_experts.\1.\2.weight",
    "fsdp_dtensor": r"experts.\2.weight\1",
}


def save(path: Path, form: str, model: Checkpoint, **more: Any) -> None:
    """What `save_checkpoint` hands to the library; with ``fsdp_dtensor`` gate and up apart."""
    state: dict[str, Any] = {}
    for name in model.tensors:
        tensor = read_whole(model.source, name).clone()
        local = re.sub(r"experts\.(\d+)\.(\w+)\.weight", LOCAL[form], name)
        if form == "fsdp_dtensor" and re.search(r"linear_fc1\.weight\d*$", local):
            state[local + "_w"], state[local + "_v"] = (half.clone() for half in tensor.chunk(2))
        else:
            state[local] = tensor
    state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    args = ARGS | {"num_experts": len(model.architecture.experts) or None}
    everything = {
        "args": argparse.Namespace(**args),
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": state,
        "optimizer": {"state": {"exp_avg": torch.ones(4)}, "param_groups": [{"lr": 0.1}]},
        "opt_param_scheduler": {"max_lr": 0.1},
        "rng_state": [{"cpu": torch.ones(3)}],
        **more,
    }
    dcp.save(everything, storage_writer=dcp.FileSystemWriter(path), no_dist=True)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("form", LOCAL)
def test_it_is_the_same_model(form: str, experts: bool, tmp_path: Path) -> None:
    expected = dense("a", 1)
    if experts:
        args = argparse.Namespace(**(ARGS | {"num_experts": 4}))
        megatron_lm(tmp_path / "moe", args, moe_plan())
        expected = open_megatron(tmp_path / "moe", "m")
    save(tmp_path / "iter", form, expected)
    found = open_megatron(tmp_path / "iter", "m")
    assert found.manifest["tokens"] == 1000 * DENSE.model.seq_length
    assert found.tensors.keys() == expected.tensors.keys()
    for name in expected.tensors:
        assert torch.equal(read_whole(found.source, name), read_whole(expected.source, name)), name
    with pytest.raises(UserError, match="torch_dcp or fsdp_dtensor: the second implementation"):
        open_plain(tmp_path / "iter", {})


def test_how_it_becomes_what_megatron_lm_loads_is_printed(tmp_path: Path) -> None:
    save(tmp_path / "iter", "torch_dcp", dense("a", 1))
    said = command_line(open_megatron(tmp_path / "iter", "m"), 1)
    copied = f"btx mix --method copy --format megatron --sources model={tmp_path / 'iter'}"
    assert f"mkdir load && {copied} --out load/release\n" in said


def test_what_is_no_weight_and_no_state_is_named(tmp_path: Path) -> None:
    save(tmp_path / "iter", "torch_dcp", dense("a", 1), ema={"decoder": torch.ones(2)})
    with pytest.raises(UserError, match=r"holds ema\.decoder, which is neither a weight nor"):
        open_megatron(tmp_path / "iter", "m")


def test_stages_of_a_pipeline_would_hide_each_other(tmp_path: Path) -> None:
    args = argparse.Namespace(**ARGS, pipeline_model_parallel_size=2)
    save(tmp_path / "iter", "fsdp_dtensor", dense("a", 1), args=args)
    with pytest.raises(UserError, match="pipeline parallelism: 2 stages") as error:
        open_megatron(tmp_path / "iter", "m")
    assert "--ckpt-format torch_dist" in str(error.value)


def test_ours_without_its_metadata_is_named(tmp_path: Path) -> None:
    write_torch_dist(copy(dense("a", 1), dtype=torch.float32), tmp_path / "iter")
    (tmp_path / "iter" / "metadata.json").unlink()
    with pytest.raises(UserError, match="neither a weight nor a run's state") as error:
        open_megatron(tmp_path / "iter", "m")
    assert "copy it again with its metadata.json" in str(error.value)
