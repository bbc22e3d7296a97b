"""A directory as Megatron-Bridge 0.6.2 writes it (``AutoBridge.import_ckpt``, one rank), made from
a Hugging Face one without it: real.py sees that both are the same to the byte where a byte matters.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

STEP = "iter_0000000"
FILE = "__0_0.distcp"
TEMPLATE = Path(__file__).with_name("run_config.yaml")

Entry = tuple[str, tuple[int, ...], tuple[int, ...], Tensor | None]
"""(key, global shape, offset, piece); without a piece an object at that place."""


def make_bridge(source: Path, out: Path) -> Path:
    """The directory of a step below ``out``, of the Hugging Face directory ``source``."""
    config = json.loads((source / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    step = out / STEP
    (step / "tokenizer").mkdir(parents=True)
    _write_weights(list(_entries(config, weights)), step)
    (step / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    described = run_config(config, source, out)
    (step / "run_config.yaml").write_text(yaml.safe_dump(described, sort_keys=True))
    _write_tokenizer(source, step / "tokenizer")
    torch.save(_train_state(), step / "train_state.pt")
    shutil.copyfile(step / "train_state.pt", out / "latest_train_state.pt")
    (out / "latest_checkpointed_iteration.txt").write_text("0")
    return step


def _write_tokenizer(source: Path, out: Path) -> None:
    """As ``transformers`` 5 saves one: the chat template in a file of its own."""
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    config = json.loads((source / "tokenizer_config.json").read_text())
    template = config.pop("chat_template", None)
    config.pop("added_tokens_decoder", None)
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if template is not None:
        (out / "chat_template.jinja").write_text(template)


def run_config(config: dict[str, Any], source: Path, out: Path) -> dict[str, Any]:
    """What ``run_config.yaml`` says: that of a tiny Llama, with what its bridges change of it."""
    described: dict[str, Any] = yaml.safe_load(TEMPLATE.read_text())
    dtype = config.get("dtype") or config["torch_dtype"]
    rope = config["rope_parameters"]
    qwen = config["model_type"].startswith("qwen3")
    half = "bfloat16" if qwen else dtype
    vocabulary = config["vocab_size"]
    described["checkpoint"]["save"] = str(out)
    described["tokenizer"]["tokenizer_model"] = str(source)
    described["model"] |= {
        "autocast_dtype": {"_call_": False, "_target_": f"torch.{half}"},
        "params_dtype": {"_call_": False, "_target_": f"torch.{dtype}"},
        "bf16": dtype == "bfloat16",
        "hf_model_id": str(source),
        "kv_channels": config["head_dim"],
        "num_query_groups": config["num_key_value_heads"],
        "make_vocab_size_divisible_by": min(vocabulary & -vocabulary, 128),
        "rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
        "seq_length": config["max_position_embeddings"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "vocab_size": vocabulary,
        "qk_layernorm": qwen,
    }
    if qwen:
        fusions = ("apply_rope_fusion", "bias_activation_fusion", "bias_dropout_fusion")
        described["model"] |= dict.fromkeys((*fusions, "persist_layer_norm"), False)
    if "moe_intermediate_size" in config:
        described["model"] |= {
            "moe_aux_loss_coeff": 0.001,
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_router_pre_softmax": not config["norm_topk_prob"],
            "moe_token_dispatcher_type": "alltoall",
            "num_moe_experts": config.get("num_experts") or config["num_local_experts"],
        }
    return described


def _entries(config: dict[str, Any], weights: dict[str, Tensor]) -> Iterator[Entry]:
    """Every piece in the order of Bridge's state dict: layers stacked, gate and up apart."""
    head = "lm_head.weight"
    yield "embedding.word_embeddings.weight", *_whole(weights["model.embed_tokens.weight"])
    layers = config["num_hidden_layers"]
    for layer in range(layers):
        own = {
            name.removeprefix(f"model.layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        for key, tensor in _layer(config, own):
            stacked = f"decoder.layers.{key}"
            if tensor is None:
                yield f"{stacked}._extra_state", (layers,), (layer,), None
            else:
                yield stacked, *_at((layers,), (layer,), tensor)
        yield from _experts(config, own, layer)
    yield "decoder.final_layernorm.weight", *_whole(weights["model.norm.weight"])
    if head in weights:
        yield "output_layer.weight", *_whole(weights[head])
    yield "common_state", (1,), (0,), None


def _layer(config: dict[str, Any], own: dict[str, Tensor]) -> Iterator[tuple[str, Tensor | None]]:
    attention = "self_attention"
    yield f"{attention}.linear_qkv.layer_norm_weight", own["input_layernorm.weight"]
    yield f"{attention}.linear_proj.weight", own["self_attn.o_proj.weight"]
    yield f"{attention}.linear_proj", None
    yield f"{attention}.linear_qkv.weight", _qkv(config, own)
    yield f"{attention}.linear_qkv", None
    for head in ("q", "k"):
        if (norm := own.get(f"self_attn.{head}_norm.weight")) is not None:
            yield f"{attention}.{head}_layernorm.weight", norm
    yield "mlp.linear_fc1.layer_norm_weight", own["post_attention_layernorm.weight"]
    if (router := own.get("mlp.gate.weight")) is not None:
        yield "mlp.router.weight", router
        return
    yield "mlp.linear_fc1.weight", torch.cat([own[f"mlp.{n}_proj.weight"] for n in ("gate", "up")])
    yield "mlp.linear_fc1", None
    yield "mlp.linear_fc2.weight", own["mlp.down_proj.weight"]
    yield "mlp.linear_fc2", None


def _experts(config: dict[str, Any], own: dict[str, Tensor], layer: int) -> Iterator[Entry]:
    count = sum(name.endswith(".down_proj.weight") for name in own)
    if "mlp.gate.weight" not in own:
        return
    grid = (config["num_hidden_layers"], count)
    for expert in range(count):
        gate, up, down = (
            own[f"mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        for name, tensor in (("linear_fc1", torch.cat([gate, up])), ("linear_fc2", down)):
            key = f"decoder.layers.mlp.experts.experts.{name}"
            yield f"{key}.weight", *_at(grid, (layer, expert), tensor)
            yield f"{key}._extra_state", grid, (layer, expert), None


def _qkv(config: dict[str, Any], own: dict[str, Tensor]) -> Tensor:
    """Group by group: the queries of a key/value head, its key, its value."""
    groups, dim = config["num_key_value_heads"], config["head_dim"]
    q, k, v = (
        own[f"self_attn.{name}_proj.weight"].view(groups, -1, config["hidden_size"])
        for name in "qkv"
    )
    assert k.shape[1] == v.shape[1] == dim
    return torch.cat([q, k, v], 1).reshape(-1, config["hidden_size"])


def _whole(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    return tuple(tensor.shape), (0,) * tensor.dim(), tensor


def _at(
    grid: tuple[int, ...], at: tuple[int, ...], tensor: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
    shape = (*grid, *tensor.shape)
    return shape, (*at, *(0,) * tensor.dim()), tensor.reshape(*(1,) * len(grid), *tensor.shape)


def _pieces(entry: Entry) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What is saved of a tensor, and where: of fc1 gate and up each for itself."""
    key, _, offset, tensor = entry
    assert tensor is not None
    if not key.endswith("linear_fc1.weight"):
        yield offset, tensor
        return
    half = tensor.shape[-2] // 2
    yield offset, _own(tensor[..., :half, :])
    yield (*offset[:-2], half, 0), _own(tensor[..., half:, :])


def _own(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)


def _write_weights(entries: list[Entry], step: Path) -> None:
    """``__0_0.distcp``, objects before tensors, and ``.metadata``."""
    known: dict[str, Any] = {}
    for key, shape, at, piece in entries:
        if piece is None:
            name = f"{key}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, shape))}"
            known[name] = BytesStorageMetadata()
            continue
        properties = TensorProperties(dtype=piece.dtype)
        empty = TensorStorageMetadata(properties, torch.Size(shape), [])
        known.setdefault(key, empty).chunks.extend(
            ChunkStorageMetadata(torch.Size(offset), part.shape)
            for offset, part in _pieces((key, shape, at, piece))
        )
    places: dict[MetadataIndex, _StorageInfo] = {}
    with open(step / FILE, "wb") as file:

        def put(index: MetadataIndex, content: Any) -> None:
            saved = io.BytesIO()
            torch.save(content, saved)
            places[index] = _StorageInfo(FILE, file.tell(), len(saved.getvalue()))
            file.write(saved.getvalue())

        for name, described in known.items():
            if isinstance(described, BytesStorageMetadata):
                put(MetadataIndex(name), _COMMON if name.startswith("common_state") else [None])
        for name, described in known.items():
            for entry in entries if not isinstance(described, BytesStorageMetadata) else ():
                for offset, part in _pieces(entry) if entry[0] == name else ():
                    put(MetadataIndex(name, torch.Size(offset)), part)
    metadata = Metadata(known, storage_data=places, storage_meta=StorageMeta(), version="1.0.0")
    (step / ".metadata").write_bytes(pickle.dumps(metadata))


_COMMON = [
    {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
        },
    }
]


def _train_state() -> dict[str, Tensor]:
    counts = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return {
        **{name: torch.tensor(0) for name in counts},
        "floating_point_operations_so_far": torch.tensor(0.0),
        **{name: torch.tensor(False) for name in ("do_train", "do_valid", "do_test")},
    }
