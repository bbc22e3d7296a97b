"""Which files of a directory are the model (as ``transformers`` has it), and what is none."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_btx.data.tokenizer import read_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.families import open_hf
from megatron_btx.families.open_checkpoint import open_checkpoint
from megatron_btx.weights.find_checkpoint import INDEX, MODEL, foreign, weight_files
from megatron_btx.weights.source import read_whole
from tests.families.made import make

transformers = pytest.importorskip("transformers")
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One file each: an untied and a tied model."""
    places = {name: tmp_path_factory.mktemp("model") for name in ("llama", "llama 3.2, tied")}
    for name, place in places.items():
        make(name, place)
    return places


def copied(models: dict[str, Path], out: Path, name: str = "llama") -> dict[str, torch.Tensor]:
    """The configuration of a model in ``out``, and its tensors."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_bytes((models[name] / "config.json").read_bytes())
    return load_file(models[name] / MODEL)


def sharded(tensors: dict[str, torch.Tensor], out: Path) -> None:
    """Two shards and their index."""
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2],
              "model-00002-of-00002.safetensors": names[1::2]}  # fmt: skip
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, out / file, metadata={"format": "pt"})
    index = {name: file for file, inside in shards.items() for name in inside}
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def theirs(path: Path) -> torch.Tensor:
    """The embedding that ``transformers`` reads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach()


def ours(path: Path) -> torch.Tensor:
    opened = open_hf(path, "m")
    return read_whole(opened.source, "embedding.word_embeddings.weight")[:70]


def test_files_are_found_in_the_order_of_transformers(models, tmp_path):
    """Each stage adds a file that must or must not count; every file holds other numbers."""
    tensors = copied(models, tmp_path)
    filled = {name: torch.full_like(t, 0.25) for name, t in tensors.items()}
    sharded(tensors, tmp_path)
    save_file(
        {"layers.0.attention.wq.weight": torch.zeros(3)}, tmp_path / "consolidated.safetensors"
    )
    save_file({"lora_A.weight": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    save_file(filled, tmp_path / "model-00001-of-00001.safetensors")
    assert torch.equal(ours(tmp_path), tensors[EMBEDDING])
    assert torch.equal(ours(tmp_path), theirs(tmp_path))
    save_file(filled, tmp_path / MODEL, metadata={"format": "pt"})  # newer than the shards
    assert torch.equal(ours(tmp_path), filled[EMBEDDING])
    assert torch.equal(ours(tmp_path), theirs(tmp_path))


@pytest.mark.parametrize("name", ["../{}", "/{}", "sub/../../{}", "C:\\{}", "", "a\0b", 7, None])
def test_an_index_names_files_inside_its_directory_only(models, tmp_path, name):
    """The file that is named exists and holds the right tensors."""
    out = tmp_path / "model"
    tensors = copied(models, out)
    save_file(tensors, tmp_path / "elsewhere.safetensors")
    if isinstance(name, str):
        absolute = str(tmp_path / "elsewhere.safetensors")
        name = absolute if name == "/{}" else name.replace("{}", "elsewhere.safetensors")
    (out / INDEX).write_text(json.dumps({"weight_map": {key: name for key in tensors}}))
    with pytest.raises(UserError, match="inside the directory") as caught:
        open_hf(out, "m")
    assert caught.value.errors[0].where == str(out / INDEX)


def test_a_link_of_the_hub_s_cache_is_followed(models, tmp_path):
    """``snapshots/REVISION/model.safetensors`` is a link to ``blobs/``."""
    tensors = copied(models, tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    save_file(tensors, tmp_path / "blobs" / "0a1b", metadata={"format": "pt"})
    os.symlink("../blobs/0a1b", tmp_path / "snapshot" / MODEL)
    assert torch.equal(ours(tmp_path / "snapshot"), theirs(tmp_path / "snapshot"))


@pytest.mark.parametrize("content", ["[", "[" * 100_000, "[]", "{}", '{"weight_map": []}', "7"])
def test_a_damaged_index_is_one_error(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match="JSON|has no weight_map") as caught:
        weight_files(tmp_path)
    assert caught.value.where == str(tmp_path / INDEX)
    assert len(str(caught.value)) < 1000


def test_a_tied_model_with_another_head_is_refused(models, tmp_path):
    """``transformers`` 4 drops the head, 5 unties: two meanings, and neither is dropped unread."""
    tensors = copied(models, tmp_path, "llama 3.2, tied")
    assert "lm_head.weight" not in tensors
    head = tensors[EMBEDDING].clone()
    save_file(tensors | {"lm_head.weight": head}, tmp_path / MODEL, metadata={"format": "pt"})
    assert torch.equal(ours(tmp_path), tensors[EMBEDDING])  # the same: tied
    other = head.clone()
    other[69, 31] += 1e-6
    save_file(tensors | {"lm_head.weight": other}, tmp_path / MODEL, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight that is stored differs") as caught:
        open_hf(tmp_path, "m")
    assert "set tie_word_embeddings to false" in caught.value.fix
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_hf(tmp_path, "m")
    assert torch.equal(read_whole(opened.source, "output_layer.weight")[:70], other)


NONE: list[tuple[str, str]] = [
    ("adapter_config.json", "an adapter"),
    ("adapter_model.safetensors", "an adapter"),
    ("model-00001-of-00002.safetensors", "without their model.safetensors.index.json"),
    ("llama.Q4_K_M.gguf", "a GGUF file"),
    ("zero_to_fp32.py", "DeepSpeed"),
    ("consolidated.safetensors", "maker's own format"),
    ("consolidated.00.pth", "maker's own format"),
    ("pytorch_model.bin", "pickle"),
    ("pytorch_model-00001-of-00002.bin", "pickle"),
    ("weights.safetensors", "no model.safetensors and no model.safetensors.index.json"),
]


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize(("file", "what"), NONE)
def test_what_is_no_model_is_named(models, tmp_path, file, what, configured):
    if configured:
        copied(models, tmp_path)
    (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        open_checkpoint(tmp_path, "m")
    assert caught.value.where.endswith(file)
    assert caught.value.fix
    if file.endswith(".gguf"):
        with pytest.raises(UserError, match=what):
            open_checkpoint(tmp_path / file, "m")


def test_a_name_of_the_hub_is_recognised(tmp_path, monkeypatch):
    """As a command line gives it, and as a recipe does, whose paths are absolute."""
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-3.1-8B"
    for path in (Path(name), tmp_path / name):
        with pytest.raises(UserError, match="Hugging Face Hub") as caught:
            open_checkpoint(path, "m")
        assert f"hf download {name} --local-dir Llama-3.1-8B" in caught.value.fix
    with pytest.raises(UserError, match="does not exist") as caught:
        read_tokenizer(tmp_path / name, "sentencepiece", where="tokenizer.path")
    assert f"hf download {name}" in caught.value.fix
    assert foreign(Path("runs/demo/seed")) is None
    (tmp_path / "runs").mkdir()
    assert foreign(Path("runs/demo")) is None


def test_a_file_instead_of_its_directory(models):
    with pytest.raises(UserError, match="not a checkpoint") as caught:
        open_checkpoint(models["llama"] / MODEL, "m")
    assert caught.value.fix == f"give {models['llama']}"


def lora(tensors: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for name in tensors:
        if "proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            made |= {f"{stem}.lora_{part}.weight": torch.zeros(2) for part in "AB"}
    return made


def packed(tensors: dict[str, Any]) -> dict[str, Any]:
    stem = "model.layers.0.mlp.up_proj"
    return {**tensors, f"{stem}.scales": torch.zeros(2), f"{stem}.qzeros": torch.zeros(2)}


NAMES: list[tuple[Any, str]] = [
    (lora, "an adapter"),
    (packed, "are quantised"),
    (lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}, "wrapped by torch.compile"),
    (lambda t: {f"module.{n}": v for n, v in t.items()}, "wrapped by DistributedDataParallel"),
    (lambda t: {n.removeprefix("model."): v for n, v in t.items() if n != "lm_head.weight"},
     "a base model without its head"),
    (lambda t: {"tok_embeddings.weight": t[EMBEDDING]}, "maker's own names"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), NAMES)
def test_tensors_of_something_else_are_one_error(models, tmp_path, change, what):
    save_file(change(copied(models, tmp_path)), tmp_path / MODEL)
    with pytest.raises(UserError, match=what) as caught:
        open_hf(tmp_path, "m")
    assert str(caught.value).count("\n  fix: ") == 1


def test_a_quantised_model_is_named_by_its_config(models, tmp_path):
    copied(models, tmp_path)
    path = tmp_path / "config.json"
    packing = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(json.loads(path.read_text()) | packing))
    with pytest.raises(UserError, match=r"quantised \(quantization_config: gptq\)") as caught:
        open_hf(tmp_path, "m")
    assert "remove" not in caught.value.fix


def test_a_pointer_of_git_lfs_is_named(models, tmp_path):
    copied(models, tmp_path)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
    (tmp_path / MODEL).write_text(text)
    with pytest.raises(UserError, match="a pointer of Git LFS") as caught:
        open_hf(tmp_path, "m")
    assert "git lfs pull" in str(caught.value)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_tied_model_without_a_matrix_of_an_embedding(models, tmp_path, shape):
    tensors = copied(models, tmp_path, "llama 3.2, tied")
    same = {name: torch.zeros(shape) for name in (EMBEDDING, "lm_head.weight")}
    save_file(tensors | same, tmp_path / MODEL)
    with pytest.raises(UserError, match=r"embed_tokens.weight has shape \(.*\), not \(70, 32\)"):
        open_hf(tmp_path, "m")


BUFFERS = [
    ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.int64, ""),
    ("model.layers.0.self_attn.bias", torch.bool, "bias has dtype BOOL.*write the files again"),
    ("model.position_ids", torch.int64, "position_ids has dtype I64.*write the files again"),
    ("model.layers.0.mlp.up_proj.codes", torch.int8, "dtype I8.*before it was quantised"),
]


@pytest.mark.parametrize(("name", "dtype", "words"), BUFFERS)
def test_numbers_of_another_kind_are_left_out_or_named(models, tmp_path, name, dtype, words):
    tensors = copied(models, tmp_path)
    save_file(tensors | {name: torch.ones(3, dtype=dtype)}, tmp_path / MODEL)
    if not words:
        assert torch.equal(ours(tmp_path), tensors[EMBEDDING])
        return
    with pytest.raises(UserError, match=f"(?s){words}"):
        open_hf(tmp_path, "m")


@pytest.mark.parametrize("value", ["2", 2.0, True, [1, "2"], {}, -2, 10**30])
def test_a_special_token_is_an_id(models, tmp_path, value):
    """It would go into the result, and fail whoever reads that."""
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": value}))
    with pytest.raises(UserError, match="eos_token_id is .*, no token's id"):
        open_hf(tmp_path, "m")


@pytest.mark.parametrize("key", ["bos_token_id", "pad_token_id"])
def test_a_text_ends_with_several_tokens_and_begins_with_one(models, tmp_path, key):
    """transformers reads a list as the end alone."""
    config = json.loads((models["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: [1], "eos_token_id": [1, 2]}))
    with pytest.raises(UserError, match=rf"{key} is \[1\], no token's id"):
        open_hf(tmp_path, "m")


def test_a_flood_is_cut_off_with_its_count(models, tmp_path):
    tensors = copied(models, tmp_path)
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, tmp_path / MODEL)
    with pytest.raises(UserError) as caught:
        open_hf(tmp_path, "m")
    lines = [line for line in str(caught.value).splitlines() if "fix:" not in line]
    count = len(tensors)
    assert len(lines) == 18
    assert sum(f"and {count - 8} more like these" in line for line in lines) == 2
