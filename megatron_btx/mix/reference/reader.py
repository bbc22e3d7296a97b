"""Directories of either format read tensor by tensor, without the engine.

What :mod:`megatron_btx.mix.reference.verify` stands on: of the weights engine only the safe reading
of pickles is used, the rest is ``safetensors`` and ``torch.load``. Names are Hugging Face's, in one
dialect: ``model.layers.L.mlp.experts.E.gate_proj.weight`` and ``model.layers.L.mlp.gate.weight``
also for a Mixtral, which has words of its own for them. Every file is opened once, and of a stored
tensor only the layer that is asked for is read, so that the work grows as the checkpoint does.
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.files import read_bytes, read_json
from megatron_btx.weights import safe_unpickle

_OTHER_WORDS = {
    ".block_sparse_moe.": ".mlp.",
    ".w1.weight": ".gate_proj.weight",
    ".w2.weight": ".down_proj.weight",
    ".w3.weight": ".up_proj.weight",
    ".router.layer.weight": ".gate.weight",
    ".router.weight": ".gate.weight",
    ".input_linear.weight": ".experts.gate_up_proj",
    ".output_linear.weight": ".experts.down_proj",
}
"""Mixtral's and Granite's."""
_WHOLE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
}
_FFN_NORM = ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
_OF_LAYER = {
    "input_layernorm.weight": (
        "self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight",
    ),
    "post_attention_layernorm.weight": _FFN_NORM,
    "self_attn.o_proj.weight": ("self_attention.linear_proj.weight",),
    "self_attn.q_norm.weight": ("self_attention.q_layernorm.weight",),
    "self_attn.k_norm.weight": ("self_attention.k_layernorm.weight",),
    "mlp.gate.weight": ("mlp.router.weight",),
    "mlp.shared_expert.down_proj.weight": ("mlp.shared_experts.linear_fc2.weight",),
    "mlp.shared_expert_gate.weight": ("mlp.shared_experts.gate_weight",),
}
"""Megatron's keys for the tensors of a layer; its two layer specs have other words for norms."""


Part = tuple[int | None, slice]
"""Expert and rows of a stacked or a fused tensor; of any other ``None`` and all rows."""


def open_plain(path: Path, declared: Mapping[str, Any]) -> PlainHF | PlainMegatron:
    """A directory of either format.

    Args:
        path: the directory.
        declared: what its manifest says of the model, for one of Megatron's that is not ours.

    Raises:
        UserError: it is of a form that the engine alone reads.
    """
    other = "torch" if any(path.glob("mp_rank_*")) else ""
    if (path / ".metadata").exists() and not (path / "metadata.json").exists():
        other = "torch_dcp or fsdp_dtensor"
    if other:
        raise UserError(
            str(path),
            f"was saved with --ckpt-format {other}: the second implementation does not read that",
            "copy it (btx mix --method copy --format megatron), and mix the copy",
        )
    return PlainMegatron(path, declared) if (path / ".metadata").exists() else PlainHF(path)


def names_of(declared: Mapping[str, Any], *, shared: bool = False) -> list[str]:
    """Every tensor that a model has, by what its manifest says of it.

    Args:
        declared: ``model`` and ``moe``, as a manifest has them.
        shared: with a shared expert and its gate, whether or not the model has one.
    """
    model = declared["model"]
    experts = declared["moe"]["experts"] if declared["moe"] else []
    has_shared = model.get("moe_shared_expert_intermediate_size") is not None
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if model["untie_embeddings_and_output_weights"]:
        names.append("lm_head.weight")
    inner = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    inner += [f"self_attn.{kind}_proj.weight" for kind in "qkvo"]
    if model.get("add_qkv_bias"):
        inner += [f"self_attn.{kind}_proj.bias" for kind in "qkv"]
    if model.get("qk_layernorm"):
        inner += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    if experts:
        inner.append("mlp.gate.weight")
    places = [f"experts.{e}." for e in range(len(experts))] or [""]
    if experts and (shared or has_shared):
        places.append("shared_expert.")
    if experts and (shared or model.get("moe_shared_expert_gate")):
        inner.append("mlp.shared_expert_gate.weight")
    for place in places:
        inner += [f"mlp.{place}{kind}_proj.weight" for kind in ("gate", "up", "down")]
    layers = range(model["num_layers"])
    return names + [f"model.layers.{layer}.{one}" for layer in layers for one in inner]


class PlainHF:
    """A Hugging Face directory."""

    tokens = 0.0
    """Nothing in it says how many it was trained on."""
    anchor = None
    """Nor whether it is an anchored branch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json(path / "config.json")
        self.model_type = config.get("model_type")
        heads: int = config["num_attention_heads"]
        self.groups: int = config.get("num_key_value_heads") or heads
        count = config.get("num_local_experts") or config.get("num_experts") or 0
        self.experts: list[str] = config.get("btx_experts") or list(map(str, range(count)))
        self._open: dict[Path, Any] = {}
        self._places: dict[str, tuple[Path, str, Part]] = {}
        self._twice: list[str] = []
        for file in _weight_files(path):
            for name in self._file(file).keys():  # noqa: SIM118
                shape = self._file(file).get_slice(name).get_shape()
                for each, part in _parts(_plain(name), shape, (heads, self.groups)):
                    if each in self._places:
                        self._twice.append(f"{each}: stored twice")
                    self._places[each] = (file, name, part)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._places

    def get(self, name: str) -> Tensor:
        """A tensor, whole.

        Raises:
            KeyError: there is none.
        """
        path, stored, (expert, rows) = self._places[name]
        if expert is None:
            return self._file(path).get_slice(stored)[rows]
        return self._file(path).get_slice(stored)[expert : expert + 1][0][rows]

    def strays(self, expected: Sequence[str], declared: Mapping[str, Any]) -> list[str]:
        """What is stored and should not be."""
        known, read = set(expected), {path.name for path in self._open}
        names = [name for name in self._places if name not in known]
        names += [p.name for p in sorted(self.path.glob("*.safetensors")) if p.name not in read]
        return [f"unexpected: {name}" for name in names] + self._twice

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise UserError(str(path), f"cannot be read: {error}", "copy it again") from error
        return self._open[path]


def _weight_files(path: Path) -> list[Path]:
    """``model.safetensors``, else those that the index names and that are there."""
    whole = path / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = path / "model.safetensors.index.json"
    named = read_json(index)["weight_map"].values() if index.is_file() else ()
    return [path / name for name in sorted(set(named)) if (path / name).is_file()]


def _plain(name: str) -> str:
    for word, plain in _OTHER_WORDS.items():
        name = name.replace(word, plain)
    return name


def _parts(name: str, shape: Sequence[int], heads: tuple[int, int]) -> Iterator[tuple[str, Part]]:
    """What a stored tensor holds: itself, matrices one above the other (``qkv_proj`` of so many
    query and key/value heads, ``gate_up_proj``), or those of every expert, stacked."""
    block, _, kind = name.removesuffix(".weight").rpartition(".")
    experts = range(shape[0]) if block.endswith(".experts") and len(shape) == 3 else None
    inside = {
        "qkv_proj": dict(zip("qkv", (heads[0], heads[1], heads[1]), strict=True)),
        "gate_up_proj": {"gate": 1, "up": 1},
    }.get(kind)
    if inside is None and experts is None:
        yield name, (None, slice(None))
        return
    rows = shape[0] if experts is None else shape[1]
    inside = inside or {kind.removesuffix("_proj"): 1}
    unit, first = rows // sum(inside.values()), 0
    for one, size in inside.items():
        own = slice(first, first := first + size * unit)
        for expert in (None,) if experts is None else experts:
            place = block if expert is None else f"{block}.{expert}"
            yield f"{place}.{one}_proj.weight", (expert, own)


class PlainMegatron:
    """A step directory as Megatron writes it: stacked over layers and experts."""

    model_type = None

    def __init__(self, path: Path, declared: Mapping[str, Any]) -> None:
        self.path = path
        data = read_bytes(path / ".metadata", safe_unpickle.LIMIT)
        stored = safe_unpickle.loads(data, path / ".metadata", safe_unpickle.METADATA_NAMES)
        entries = stored.state_dict_metadata.items()
        self._stored = {key: entry for key, entry in entries if hasattr(entry, "chunks")}
        self._thick = {
            key: max((chunk.sizes[0] for chunk in entry.chunks if chunk.sizes), default=1)
            for key, entry in self._stored.items()
        }
        """Layers (or rows) that one chunk holds at most."""
        self._chunks: dict[str, dict[int, list[Any]]] = defaultdict(lambda: defaultdict(list))
        for index, place in stored.storage_data.items():
            if index.fqn in self._stored:
                first = index.offset[0] if index.offset else 0
                self._chunks[index.fqn][first].append((tuple(index.offset or ()), place))
        self._read: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()
        own = path / "manifest.json"
        self._manifest = read_json(own) if own.exists() else declared
        model: dict[str, Any] = self._manifest["model"]
        self._model = model
        self.groups: int = model["num_query_groups"] or model["num_attention_heads"]
        moe = self._manifest["moe"]
        self.experts: list[str] = moe["experts"] if moe else []

    @property
    def anchor(self) -> int | None:
        """Which of an anchored branch's two experts is the seed's; ``None``: it is no branch."""
        name = self._manifest.get("anchor")
        return self.experts.index(name) if name in self.experts else None

    @property
    def tokens(self) -> float:
        """That the model was trained on."""
        return float(self._manifest.get("tokens") or 0)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        keys, _ = self._place(name)
        return any(key in self._stored for key in keys)

    def get(self, name: str) -> Tensor:
        """A tensor, whole.

        Raises:
            KeyError: there is none.
            ValueError: it is stored under two names, and they differ.
        """
        keys, index = self._place(name)
        found = [self._load(key, index) for key in keys if key in self._stored]
        if not found:
            raise KeyError(name)
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise ValueError(f"{name} is stored twice, and differs")
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return found[0][: self._manifest["vocab_size"]]
        if match := re.fullmatch(r".*\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            return self._heads(found[0], match[1])
        if name.endswith((".gate_proj.weight", ".up_proj.weight")):
            return found[0].chunk(2)[name.endswith(".up_proj.weight")]
        return found[0]

    def strays(self, expected: Sequence[str], declared: Mapping[str, Any]) -> list[str]:
        """What is stored and should not be: keys, layers, experts, rows of the vocabulary."""
        known: dict[str, tuple[int, ...]] = {}
        for name in expected:
            keys, index = self._place(name)
            stacked = (declared["model"]["num_layers"], len(self.experts))[: len(index)]
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                stacked = (declared["padded_vocab_size"],)
            known |= dict.fromkeys(keys, stacked)
        lines = [f"unexpected: {key}" for key in self._stored if key not in known]
        for key, size in ((key, tuple(entry.size)) for key, entry in self._stored.items()):
            want = known.get(key, ())
            if size[: len(want)] != want:
                lines.append(f"unexpected: {key} is stored for {size[: len(want)]}, not {want}")
        return lines

    def _place(self, name: str) -> tuple[Sequence[str], tuple[int, ...]]:
        """The keys under which a tensor may be stored, and which layer and expert of them."""
        if name in _WHOLE:
            return (_WHOLE[name],), ()
        _, _, number, rest = name.split(".", 3)
        layer, stacked = int(number), "decoder.layers."
        if rest in _OF_LAYER:
            return [stacked + key for key in _OF_LAYER[rest]], (layer,)
        if match := re.fullmatch(r"self_attn\.[qkv]_proj\.(weight|bias)", rest):
            return [f"{stacked}self_attention.linear_qkv.{match[1]}"], (layer,)
        match = re.fullmatch(
            r"mlp\.(?:experts\.(\d+)\.|(shared_expert)\.)?(gate|up|down)_proj\.weight", rest
        )
        if match is None:
            raise KeyError(name)
        half = "linear_fc2.weight" if match[3] == "down" else "linear_fc1.weight"
        if match[1]:
            return [f"{stacked}mlp.experts.experts.{half}"], (layer, int(match[1]))
        return [f"{stacked}mlp.{'shared_experts.' if match[2] else ''}{half}"], (layer,)

    def _heads(self, fused: Tensor, kind: str) -> Tensor:
        """q, k or v of Megatron's fused matrix or bias, head by head."""
        model = self._model
        heads = model["num_attention_heads"]
        dim = model["kv_channels"] or model["hidden_size"] // heads
        queries = heads // self.groups
        rows: list[Tensor] = []
        for group in range(self.groups):
            first = group * (queries + 2) * dim
            start, count = {"q": (0, queries), "k": (queries, 1), "v": (queries + 1, 1)}[kind]
            rows.append(fused[first + start * dim : first + (start + count) * dim])
        return torch.cat(rows)

    def _load(self, key: str, index: tuple[int, ...]) -> Tensor:
        """One layer (and expert) of a stored tensor, through torch.load; the last few are kept,
        for q, k and v lie in one, gate and up in another."""
        if (key, index) in self._read:
            return self._read[key, index]
        entry = self._stored[key]
        size = tuple(entry.size)
        out = torch.empty(size[len(index) :], dtype=entry.properties.state[0])
        chunks = self._chunks[key]
        rows = range(index[0] - self._thick[key] + 1, index[0] + 1) if index else list(chunks)
        for row in rows:
            for offset, place in chunks.get(row, ()):
                self._copy(out, index, offset, place)
        self._read[key, index] = out
        while len(self._read) > 4:
            self._read.popitem(last=False)
        return out

    def _copy(self, out: Tensor, index: tuple[int, ...], offset: Any, place: Any) -> None:
        """What one chunk holds of a layer."""
        with (self.path / Path(place.relative_path).name).open("rb") as file:
            file.seek(place.offset)
            part = torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
        inside = [at - start for at, start in zip(index, offset, strict=False)]
        if any(not 0 <= at < n for at, n in zip(inside, part.shape, strict=False)):
            return
        part = part[tuple(inside)]
        begin = offset[len(index) :]
        out[tuple(slice(o, o + n) for o, n in zip(begin, part.shape, strict=True))] = part
