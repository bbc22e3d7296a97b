"""``btx verify``: compute a result again by another path and compare it bit for bit.

Of the weights engine only the safe reading of pickles is used: tensors are loaded whole (by
``safetensors`` and ``torch.load``), in Hugging Face names, and every rule is written out once more
as a plain float64 loop.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.weights import pickles

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def show(result: Path, out: TextIO) -> int:
    """Print every tensor that differs; 0 where none does."""
    try:
        lineage = json.loads((result / "mix.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"no lineage to verify: {error}"
        raise UserError(str(result), what, "give a directory that btx mix wrote") from error
    wrong, count = [], 0
    for name, same in compare(result, lineage):
        count += 1
        if not same:
            wrong.append(name)
    for name in wrong:
        out.write(f"differs: {name}\n")
    out.write(f"{result}: {count - len(wrong)} of {count} tensors agree\n")
    return 1 if wrong else 0


def compare(result: Path, lineage: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Every tensor of the result by its Hugging Face name, and whether it is what it should be.

    Raises:
        UserError: the sources are not there, or the mix is none that has a second implementation.
    """
    asked = lineage["request"]
    plain = asked["dare"] is None and not asked["fold_norms"] and not asked["noise"]
    covered = ("btx", "average", "copy", "upcycle")
    if asked["method"] not in covered or not plain or asked["num_chunks"] != 1:
        what = f"{asked['method']} with these options has no second implementation"
        raise UserError(str(result), what, f"verify covers plain {', '.join(covered)}")
    models = [_Model(Path(source["path"])) for source in lineage["sources"]]
    made = _Model(result)
    weights = _weights(asked, lineage)
    for name in made.names():
        got = made.get(name)
        yield name, torch.equal(got, _expected(name, got, models, weights, asked))


def _expected(
    name: str, got: Tensor, models: list[_Model], weights: list[float], asked: dict[str, Any]
) -> Tensor:
    if ".block_sparse_moe.gate." in name:
        return _router(name, got, asked)
    if ".block_sparse_moe.experts." in name:
        layer, _, rest = name.partition(".block_sparse_moe.experts.")
        expert, which, _ = rest.split(".")
        own = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[which]
        model = models[0] if asked["method"] == "upcycle" else models[int(expert)]
        return model.get(f"{layer}.mlp.{own}.weight").double().to(got.dtype)
    total = torch.zeros(got.shape, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        total += weight * model.get(name).double()
    return (total / sum(weights)).to(got.dtype)


def _router(name: str, got: Tensor, asked: dict[str, Any]) -> Tensor:
    """The draw, number by number of its definition: blocks of 65536, Philox keyed by SHA-256."""
    layer = name.split(".")[2]
    canonical = f"decoder.layers.{layer}.mlp.router.weight"
    numbers: list[numpy.ndarray] = []
    for block in range(math.ceil(got.numel() / 65536)):
        key = hashlib.sha256(f"{asked['random_seed']}/{canonical}/{block}".encode()).digest()[:16]
        philox = numpy.random.Philox(key=int.from_bytes(key, "little"))
        generator = numpy.random.Generator(philox)
        kind = asked["router_init"]
        numbers.append(
            numpy.zeros(65536)
            if kind == "zeros"
            else generator.standard_normal(65536)
            if kind == "normal"
            else generator.random(65536) * 2 - 1
        )
    flat = torch.from_numpy(numpy.concatenate(numbers) * asked["router_init_std"])
    return flat[: got.numel()].reshape(got.shape).to(got.dtype)


def _weights(asked: dict[str, Any], lineage: dict[str, Any]) -> list[float]:
    given = dict(entry.rsplit("=", 1) for entry in asked["average"])
    return [float(given.get(source["name"], 1.0)) for source in lineage["sources"]]


class _Model:
    """A directory of either format, tensor by tensor in Hugging Face names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._megatron = (path / ".metadata").exists()
        if self._megatron:
            data = (path / ".metadata").read_bytes()
            self._stored = pickles.loads(data, path, pickles.METADATA_NAMES)
            self._last: tuple[str, Tensor] | None = None
            self.manifest = json.loads((path / "manifest.json").read_text())
        else:
            self._files = {
                name: file
                for file in sorted(path.glob("*.safetensors"))
                for name in safe_open(file, "pt").keys()  # noqa: SIM118
            }

    def names(self) -> list[str]:
        if not self._megatron:
            return list(self._files)
        shape, moe = self.manifest["model"], self.manifest["moe"]
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        if shape["untie_embeddings_and_output_weights"]:
            names.append("lm_head.weight")
        for layer in range(shape["num_layers"]):
            inner = ["input_layernorm", "post_attention_layernorm"]
            inner += [f"self_attn.{kind}_proj" for kind in "qkvo"]
            if moe:
                inner.append("block_sparse_moe.gate")
                for expert in range(moe["num_moe_experts"]):
                    inner += [f"block_sparse_moe.experts.{expert}.w{i}" for i in (1, 2, 3)]
            else:
                inner += [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]
            names += [f"model.layers.{layer}.{one}.weight" for one in inner]
        return names

    def get(self, name: str) -> Tensor:
        if not self._megatron:
            with safe_open(self._files[name], "pt") as file:
                return file.get_tensor(name)
        return self._from_megatron(name)

    def _from_megatron(self, name: str) -> Tensor:
        model, vocabulary = self.manifest["model"], self.manifest["vocab_size"]
        whole = {
            "model.embed_tokens.weight": "embedding.word_embeddings.weight",
            "lm_head.weight": "output_layer.weight",
            "model.norm.weight": "decoder.final_layernorm.weight",
        }
        if name in whole:
            return self._load(whole[name])[:vocabulary]
        _, _, number, rest = name.removesuffix(".weight").split(".", 3)
        layer = int(number)
        ffn = model["ffn_hidden_size"]
        if rest == "input_layernorm":
            return self._load("decoder.layers.self_attention.linear_qkv.layer_norm_weight")[layer]
        if rest == "post_attention_layernorm":
            moe = "pre_mlp_layernorm.weight"
            dense = "mlp.linear_fc1.layer_norm_weight"
            return self._load(f"decoder.layers.{moe if self.manifest['moe'] else dense}")[layer]
        if rest == "self_attn.o_proj":
            return self._load("decoder.layers.self_attention.linear_proj.weight")[layer]
        if rest.startswith("self_attn."):
            return self._heads(layer, rest[len("self_attn.")])
        if rest == "block_sparse_moe.gate":
            return self._load("decoder.layers.mlp.router.weight")[layer]
        *_, expert, which = rest.rsplit(".", 2)
        key = "mlp.experts.experts" if "experts" in rest else "mlp"
        index = (layer, int(expert)) if "experts" in rest else (layer,)
        if which in ("w2", "down_proj"):
            return self._load(f"decoder.layers.{key}.linear_fc2.weight")[index]
        fc1 = self._load(f"decoder.layers.{key}.linear_fc1.weight")[index]
        return fc1[:ffn] if which in ("w1", "gate_proj") else fc1[ffn:]

    def _heads(self, layer: int, kind: str) -> Tensor:
        """q, k or v of Megatron's fused matrix, head by head."""
        model = self.manifest["model"]
        fused = self._load("decoder.layers.self_attention.linear_qkv.weight")[layer]
        heads = model["num_attention_heads"]
        groups = model["num_query_groups"] or heads
        dim = model["kv_channels"] or model["hidden_size"] // heads
        queries = heads // groups
        rows: list[Tensor] = []
        for group in range(groups):
            first = group * (queries + 2) * dim
            start, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[kind]
            rows.append(fused[first + start * dim : first + (start + count) * dim])
        return torch.cat(rows)

    def _load(self, key: str) -> Tensor:
        """A stored tensor, whole, through torch.load; the last one is kept."""
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        entry = self._stored.state_dict_metadata[key]
        tensor = torch.empty(tuple(entry.size), dtype=entry.properties.state[0])
        for index, place in self._stored.storage_data.items():
            if index.fqn != key:
                continue
            with (self.path / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                part = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
            where = tuple(slice(o, o + n) for o, n in zip(index.offset, part.shape, strict=True))
            tensor[where] = part
        self._last = (key, tensor)
        return tensor
