"""Directories that are written: read by others, resumed, refused when in doubt."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_btx.errors import UserError
from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import copy
from megatron_btx.weights.directory import LargeFile, write_directory
from megatron_btx.weights.execute import Execution
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.source import read_whole
from megatron_btx.weights.torch_dist import TorchDistSource
from megatron_btx.weights.write_safetensors import write_safetensors
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.engine.harness import assemble
from tests.engine.test_layouts import EP2, TP2_PP2_EP2
from tests.weights.models import moe_plan
from tests.weights.ranks_side import load_through_megatron


def manifest(plan) -> dict[str, bytes]:
    return {
        "manifest.json": json.dumps(
            {"format": "megatron_btx/1", "layout": {}, **plan.architecture.to_json()}
        ).encode()
    }


def tree_hash(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        digest.update(str(path.relative_to(directory)).encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_torch_dist_directory_is_the_plan(tmp_path, dtype):
    plan = moe_plan(dtype)
    out = tmp_path / "out"
    write_torch_dist(
        plan, out, files=lambda: manifest(plan), shard=50_000, execution=Execution(slab=1000)
    )
    assert len(list(out.glob("*.distcp"))) > 3
    again = open_megatron(out, "again")
    assert again.architecture == plan.architecture
    assert list(again.tensors) == list(plan.targets)
    for name in plan.targets:
        assert torch.equal(read_whole(again.source, name), plan.evaluate(name)), name
    embedding = read_whole(TorchDistSource(out), "embedding.word_embeddings.weight")
    assert embedding.shape == (128, 32)
    assert not embedding[100:].any()


def test_each_archive_is_what_torch_loads(tmp_path):
    """torch.load and zipfile, which check what we wrote by their own code."""
    plan = moe_plan(torch.bfloat16)
    write_torch_dist(plan, tmp_path / "out", shard=10_000, execution=Execution(slab=333))
    source = TorchDistSource(tmp_path / "out")
    for stored in source._stored.values():
        whole = torch.empty(stored.shape, dtype=stored.dtype)
        for chunk in stored.chunks:
            assert chunk.offset % 64 == 0
            data = chunk.path.read_bytes()[chunk.offset : chunk.offset + chunk.length]
            part = tmp_path / "part.pt"
            part.write_bytes(data)
            assert zipfile.ZipFile(part).testzip() is None
            whole[tuple(slice(*ends) for ends in chunk.box)] = torch.load(part, weights_only=True)
    assert len(source._archives) == 0


@pytest.mark.parametrize("layout", [EP2, TP2_PP2_EP2])
def test_megatron_loads_it_under_any_layout(ranks, tmp_path, layout):
    plan = moe_plan()
    write_torch_dist(plan, tmp_path / "out", files=lambda: manifest(plan), shard=100_000)
    results = ranks.run(load_through_megatron, layout.world_size, tmp_path / "out", layout, "fp32")
    found = assemble(results)
    fc1 = found["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    for layer in range(4):
        for expert in range(4):
            name = f"decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight"
            assert torch.equal(torch.from_numpy(fc1[layer, expert]), plan.evaluate(name))
    qkv = found["decoder.layers.self_attention.linear_qkv.weight"]
    want = plan.evaluate("decoder.layers.2.self_attention.linear_qkv.weight")
    assert torch.equal(torch.from_numpy(qkv[2]), want)


def test_the_same_bytes_whatever_the_slab(tmp_path):
    """Global tensors do not depend on how much of them is made at a time."""
    plan = moe_plan(torch.bfloat16)
    hashes = set()
    for slab in (64, 1000, 1 << 20):
        write_safetensors(plan, tmp_path / f"{slab}", execution=Execution(slab=slab, workers=2))
        hashes.add(tree_hash(tmp_path / f"{slab}"))
    assert len(hashes) == 1
    tensors = load_file(tmp_path / "64" / "model.safetensors")
    assert tensors.keys() == plan.targets.keys()
    for name in ("decoder.layers.1.mlp.router.weight", "output_layer.weight"):
        assert torch.equal(tensors[name], plan.evaluate(name))


def test_formats_there_and_back(tmp_path):
    """torch_dist -> Hugging Face -> torch_dist, the same tensors."""
    plan = moe_plan(torch.bfloat16)
    write_torch_dist(plan, tmp_path / "a", files=lambda: manifest(plan))
    write_hf(copy(open_megatron(tmp_path / "a", "a"), dtype=torch.bfloat16), tmp_path / "b")
    from megatron_btx.families import open_hf

    back = copy(open_hf(tmp_path / "b", "b"), dtype=torch.bfloat16)
    for name in plan.targets:
        assert torch.equal(back.evaluate(name), plan.evaluate(name)), name


def test_finished_pieces_are_kept_and_those_of_another_plan_are_not(tmp_path):
    written = []

    def piece(name, fail=False):
        def write(file):
            if fail:
                raise KeyboardInterrupt
            written.append(name)
            file.write(b"x")

        return LargeFile(name, 1, write)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_directory(out, identity="1", large_files=[piece("a"), piece("b", True)], files=dict)
    write_directory(out, identity="1", large_files=[piece("a"), piece("b")], files=dict)
    assert written == ["a", "b"]
    other = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        write_directory(other, identity="1", large_files=[piece("a"), piece("b", True)], files=dict)
    write_directory(other, identity="2", large_files=[piece("a"), piece("b")], files=dict)
    assert written == ["a", "b", "a", "a", "b"]
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_what_exists_or_does_not_fit_is_refused_with_nothing_left(tmp_path):
    plan = moe_plan()
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_safetensors(plan, tmp_path / "there")
    huge = LargeFile("a", 1 << 60, lambda file: None)
    with pytest.raises(UserError, match="GiB"):
        write_directory(tmp_path / "new", identity="", large_files=[huge], files=dict)

    def no_space(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_directory(
            tmp_path / "new", identity="", large_files=[LargeFile("a", 1, no_space)], files=dict
        )
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(plan, Path("/proc/nowhere/out"))
    assert os.listdir(tmp_path) == ["there"]
