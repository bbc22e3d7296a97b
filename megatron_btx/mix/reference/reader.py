"""Directories of either format read whole tensor by whole tensor, without the engine.

What :mod:`megatron_btx.mix.reference.verify` stands on: of the weights engine only the safe reading
of pickles is used, the rest is ``safetensors`` and ``torch.load``. Names are Hugging Face's, in one
dialect: ``model.layers.L.mlp.experts.E.gate_proj.weight`` and ``model.layers.L.mlp.gate.weight``
also for a Mixtral, which has words of its own for them.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.weights import safe_unpickle

_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_WHOLE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
_OF_LAYER = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "mlp.gate.weight": "mlp.router.weight",
}


Part = tuple[int | None, int | None]
"""Expert and half of a stacked tensor; of any other ``None`` twice."""


def open_plain(path: Path, declared: Mapping[str, Any]) -> PlainHF | PlainMegatron:
    """A directory of either format.

    Args:
        path: the directory.
        declared: what its manifest says of the model, for one of Megatron's that is not ours.

    Raises:
        UserError: it is of the form ``--ckpt-format torch``, which the engine alone reads.
    """
    if any(path.glob("mp_rank_*")):
        raise UserError(
            str(path),
            "was saved with --ckpt-format torch: the second implementation does not read that form",
            "copy it (btx mix --method copy --format megatron), and mix the copy",
        )
    return PlainMegatron(path, declared) if (path / ".metadata").exists() else PlainHF(path)


class PlainHF:
    """A Hugging Face directory."""

    tokens = 0.0
    """Nothing in it says how many it was trained on."""

    def __init__(self, path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        self.groups: int = config.get("num_key_value_heads") or config["num_attention_heads"]
        count = config.get("num_local_experts") or config.get("num_experts") or 0
        self.experts: list[str] = config.get("btx_experts") or list(map(str, range(count)))
        self._files: dict[str, tuple[Path, str, Part]] = {}
        for file in sorted(path.glob("*.safetensors")):
            for name in safe_open(file, "pt").keys():  # noqa: SIM118
                plain = name.replace(".block_sparse_moe.", ".mlp.")
                for word, kind in _MIXTRAL.items():
                    plain = plain.replace(f".{word}.weight", f".{kind}.weight")
                for each, part in _parts(plain, len(self.experts)):
                    self._files[each] = (file, name, part)

    @property
    def names(self) -> list[str]:
        """Every tensor's."""
        return list(self._files)

    def get(self, name: str) -> Tensor:
        """A tensor, whole."""
        path, stored, (expert, half) = self._files[name]
        with safe_open(path, "pt") as file:
            whole = file.get_tensor(stored)
        own = whole if expert is None else whole[expert]
        return own if half is None else own.chunk(2)[half]


def _parts(name: str, experts: int) -> Iterator[tuple[str, Part]]:
    """What a stored tensor holds: itself, or one matrix or two of every expert, stacked."""
    two = (("gate_proj", 0), ("up_proj", 1))
    inside: dict[str, tuple[tuple[str, int | None], ...]] = {
        "gate_up_proj": two,
        "down_proj": (("down_proj", None),),
    }
    block, _, kind = name.rpartition(".experts.")
    if not block or kind not in inside:
        yield name, (None, None)
        return
    for expert in range(experts):
        for one, half in inside[kind]:
            yield f"{block}.experts.{expert}.{one}.weight", (expert, half)


class PlainMegatron:
    """A step directory as we write it: stacked over layers and experts."""

    def __init__(self, path: Path, declared: Mapping[str, Any]) -> None:
        self.path = path
        data = (path / ".metadata").read_bytes()
        self._stored = safe_unpickle.loads(data, path, safe_unpickle.METADATA_NAMES)
        self._last: tuple[str, Tensor] | None = None
        own = path / "manifest.json"
        self._manifest = json.loads(own.read_text()) if own.exists() else declared
        model: dict[str, Any] = self._manifest["model"]
        self._model = model
        self.groups: int = model["num_query_groups"] or model["num_attention_heads"]
        moe = self._manifest["moe"]
        self.experts: list[str] = moe["experts"] if moe else []

    @property
    def tokens(self) -> float:
        """That the model was trained on."""
        return float(self._manifest.get("tokens") or 0)

    @property
    def names(self) -> list[str]:
        """Every tensor's."""
        model = self._model
        names = ["model.embed_tokens.weight", "model.norm.weight"]
        if model["untie_embeddings_and_output_weights"]:
            names.append("lm_head.weight")
        inner = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        inner += [f"self_attn.{kind}_proj.weight" for kind in "qkvo"]
        if model.get("add_qkv_bias"):
            inner += [f"self_attn.{kind}_proj.bias" for kind in "qkv"]
        if model.get("qk_layernorm"):
            inner += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
        if self.experts:
            inner.append("mlp.gate.weight")
        for place in [f"experts.{e}." for e in range(len(self.experts))] or [""]:
            inner += [f"mlp.{place}{kind}_proj.weight" for kind in ("gate", "up", "down")]
        layers = range(model["num_layers"])
        return names + [f"model.layers.{layer}.{one}" for layer in layers for one in inner]

    def get(self, name: str) -> Tensor:
        """A tensor, whole."""
        if name in _WHOLE:
            vocabulary = self._manifest["vocab_size"]
            return self._load(_WHOLE[name])[:vocabulary]
        _, _, number, rest = name.split(".", 3)
        layer = int(number)
        if rest in _OF_LAYER:
            return self._load(f"decoder.layers.{_OF_LAYER[rest]}")[layer]
        if rest == "post_attention_layernorm.weight":
            moe, dense = "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"
            return self._load(f"decoder.layers.{moe if self.experts else dense}")[layer]
        if match := re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest):
            return self._heads(layer, match[1], match[2])
        match = re.fullmatch(r"mlp\.(?:experts\.(\d+)\.)?(gate|up|down)_proj\.weight", rest)
        if match is None:
            raise KeyError(name)
        key = "decoder.layers.mlp." + ("experts.experts." if match[1] else "")
        index = (layer, int(match[1])) if match[1] else (layer,)
        if match[2] == "down":
            return self._load(f"{key}linear_fc2.weight")[index]
        gate, up = self._load(f"{key}linear_fc1.weight")[index].chunk(2)
        return gate if match[2] == "gate" else up

    def _heads(self, layer: int, kind: str, which: str) -> Tensor:
        """q, k or v of Megatron's fused matrix or bias, head by head."""
        model = self._model
        fused = self._load(f"decoder.layers.self_attention.linear_qkv.{which}")[layer]
        heads = model["num_attention_heads"]
        dim = model["kv_channels"] or model["hidden_size"] // heads
        queries = heads // self.groups
        rows: list[Tensor] = []
        for group in range(self.groups):
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
