"""The mixes' rules a second time, by plain loops: whole tensors, float64, no plan.

The second implementation that ``btx verify`` compares results with. It knows the words of
``mix.json``, and the definition of a random number here: number i of ``name`` is number ``i mod
65536`` of numpy's Philox, keyed by the first half of SHA-256 of ``seed/name/(i div 65536)``.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_btx.errors import UserError
from megatron_btx.mix.reference.reader import open_plain

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
_ROUTER = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
_HEADS = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_FFN = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight")
_REST = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "lm_head.weight": "output_layer.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
}


class _Longer:
    """A model with the rows of embedding and head that it lacks, of the first that has them."""

    def __init__(self, model: Any, givers: list[Any]) -> None:
        self._model, self._givers = model, givers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._model.get(name)
        for giver in (
            self._givers if name in ("model.embed_tokens.weight", "lm_head.weight") else ()
        ):
            tensor = torch.cat([tensor, giver.get(name)[len(tensor) :]])
        return tensor


class Rules:
    """What every tensor of one result should be.

    Raises:
        UserError: a source is not there any more, or the file of router rows is not what it was.
    """

    def __init__(self, lineage: Mapping[str, Any]) -> None:
        self.asked: Mapping[str, Any] = lineage["request"]
        self.method: str = self.asked["method"]
        self.labels: list[str] = [source["name"] for source in lineage["sources"]]
        paths = [Path(source["path"]) for source in lineage["sources"]]
        for path in paths:
            if not path.is_dir():
                raise UserError(str(path), "the source is not there", "put it back to verify")
        said = zip(paths, lineage["sources"], strict=True)
        self.models: list[Any] = [open_plain(path, source) for path, source in said]
        if self.asked.get("align_vocab"):
            named = zip(self.labels, self.models, strict=True)
            givers = sorted(named, key=lambda one: one[0] != self.asked["seed_model"])
            self.models = [_Longer(model, [giver for _, giver in givers]) for model in self.models]
        self.base = None
        if label := self.asked.get("base"):  # it is no expert: those are counted without it
            place = self.labels.index(label)
            self.base = self.models.pop(place)
            del self.labels[place]
        moe = lineage["architecture"]["moe"]
        self.experts: list[str] = moe["experts"] if moe else []
        self.dtype = _DTYPES[lineage["dtype"]]
        self.centroids: str | None = self.asked.get("centroids")
        if self.centroids is not None:
            _check_rows(Path(self.centroids), lineage.get("centroids_sha256"))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the result: in fp64 where it is computed, in its source's dtype where it is
        copied."""
        if match := _ROUTER.fullmatch(name):
            return self._router(name, match[1])
        if match := _EXPERT.fullmatch(name):
            return self._expert(match[1], int(match[2]), match[3])
        if self.method in ("copy", "drop", "append", "replace", "upcycle"):
            return self.models[0].get(name)
        return self._average(name) if self.base is None else self.base.get(name)

    # ---- averages

    def _average(self, name: str) -> Tensor:
        weights = self._weights(_group(name))
        parts = [model.get(name).double() for model in self.models]
        if self.asked["dare"] is not None:
            return self._dare(name, weights, parts)
        if self.asked.get("ties") is not None:
            return self._ties(name, weights, parts)
        total = torch.zeros_like(parts[0])
        for weight, part in zip(weights, parts, strict=True):
            total += weight * part
        return total / sum(weights)

    def _ties(self, name: str, weights: list[float], parts: list[Tensor]) -> Tensor:
        """The seed, and the mean of the largest differences whose sign is that of their sum."""
        seed = self.labels.index(self.asked["seed_model"])
        kept = []
        for model, part in enumerate(parts):
            if model != seed:
                moved = part - parts[seed]
                kept.append((weights[model], moved * (moved.abs() >= self._threshold(name, model))))
        elected, total, mass = (torch.zeros_like(parts[seed]) for _ in range(3))
        for weight, moved in kept:
            elected += weight * moved
        for weight, moved in kept:
            agrees = torch.sign(moved) * torch.sign(elected) > 0
            total += weight * moved * agrees
            mass += weight * agrees
        return parts[seed] + torch.where(mass > 0, total / mass, 0.0)

    def _threshold(self, name: str, model: int) -> float:
        """Over all that Megatron stores in one tensor: q, k and v together, gate and up."""
        together = [name]
        if match := _HEADS.fullmatch(name):
            layer, _, which = match.groups()
            together = [f"model.layers.{layer}.self_attn.{k}_proj.{which}" for k in "qkv"]
        if (match := _FFN.fullmatch(name)) and match[2] != "down":
            block = f"model.layers.{match[1]}.mlp."
            together = [block + "gate_proj.weight", block + "up_proj.weight"]
        seed = self.models[self.labels.index(self.asked["seed_model"])]
        own = self.models[model]
        moved = [(own.get(n).double() - seed.get(n).double()).abs().flatten() for n in together]
        every = torch.cat(moved).sort(descending=True).values
        return float(every[max(1, round(self.asked["ties"] * len(every))) - 1])

    def _weights(self, group: str) -> list[float]:
        given = [entry for entry in self.asked["average"] if entry != "uniform"]
        pairs = [entry.partition(":") for entry in self.asked["average_groups"]]
        given = [weight for own, _, weight in pairs if own == group] or given
        if given == ["tokens"]:
            seed = self.asked["seed_model"]
            each = zip(self.labels, self.models, strict=True)
            return [0.0 if label == seed else model.tokens for label, model in each]
        by_name = dict(entry.rsplit("=", 1) for entry in given)
        if not given and any(model.anchor is not None for model in self.models):
            by_name = {self.asked["seed_model"]: "0"}  # the anchor of the branches is none of them
        return [float(by_name.get(label, 1.0)) for label in self.labels]

    def _dare(self, name: str, weights: list[float], parts: list[Tensor]) -> Tensor:
        """The seed, and of each difference from it what was kept, over the share that is kept."""
        kept = 1.0 - self.asked["dare"]
        base = parts[self.labels.index(self.asked["seed_model"])]
        moved = torch.zeros_like(base)
        for label, weight, part in zip(self.labels, weights, parts, strict=True):
            if label != self.asked["seed_model"]:
                fused, shape = self._fused(name, part)
                chosen = self._uniform(f"{label}/{fused}", shape) < kept
                moved += weight * self._cut(name, chosen.double()) * (part - base)
        return base + moved / (kept * sum(weights))

    # ---- experts

    def _expert(self, layer: str, expert: int, kind: str) -> Tensor:
        """gate, up or down of one expert."""
        if self.method in ("copy", "drop", "append", "replace"):
            return self._kept_expert(layer, expert, kind)
        chunks = self.asked["num_chunks"] if self.method in ("split", "upcycle") else 1
        if self.method == "blend":
            count = len(self.models)
            parts = [self._dense(model, layer, kind) for model in range(count)]
            cut = [_chunk(part, kind, expert, count) for part in parts]
            return torch.cat(cut, 1 if kind == "down" else 0)
        model = 0 if self.method == "upcycle" else expert // chunks
        dense = self._dense(model, layer, kind)
        own = _chunk(dense, kind, expert % chunks, chunks)
        if self.method == "upcycle":
            return self._upcycled(own, dense, layer, expert, kind, chunks)
        if self.method == "btx" and self.asked["fold_norms"] and kind != "down":
            gain = f"model.layers.{layer}.post_attention_layernorm.weight"
            averaged = nearest(self._average(gain), self.dtype).double()
            return own.double() * self.models[model].get(gain).double() / averaged
        if chunks > 1 and self.asked["scale"] == "down" and kind == "down":
            return own.double() * chunks
        return own

    def _kept_expert(self, layer: str, expert: int, kind: str) -> Tensor:
        """Of an MoE that had it already; the last one of an appended MoE is the dense model's, and
        the one that has replaced another."""
        appended = self.method == "append" and expert == len(self.experts) - 1
        if appended or (self.method == "replace" and self.experts[expert] == self.labels[1]):
            return self._dense(1, layer, kind)
        old = f"model.layers.{layer}.mlp.experts.{self._before(expert)}.{kind}_proj.weight"
        return self.models[0].get(old)

    def _upcycled(
        self, own: Tensor, dense: Tensor, layer: str, expert: int, kind: str, chunks: int
    ) -> Tensor:
        """A copy: some units drawn anew, scaled, with noise."""
        asked, label = self.asked, self.experts[expert]
        fc = "linear_fc2" if kind == "down" else "linear_fc1"
        name = f"decoder.layers.{layer}.mlp.{fc}.weight"
        units = own.shape[1] if kind == "down" else own.shape[0]
        shape = own.shape if kind == "down" else (2 * units, own.shape[1])

        def drawn(what: str) -> Tensor:
            numbers = self._normal(what, shape)
            return {"down": numbers, "gate": numbers[:units], "up": numbers[-units:]}[kind]

        value = own
        if asked["drop_ratio"]:
            order = self._uniform(f"{label}/decoder.layers.{layer}/units", (units,)).argsort()
            gone = order[: round(asked["drop_ratio"] * units)]
            moments = dense.double().mean(), dense.double().std(correction=0)
            centre, spread = (float(moment.float()) for moment in moments)
            new = drawn(f"{label}/{name}/new") * spread + centre
            value = own.double()
            if kind == "down":
                value[:, gone] = new[:, gone]
            else:
                value[gone] = new[gone]
        if chunks > 1 and asked["scale"] == "down" and kind == "down":
            value = value.double() * chunks
        if chunks > 1 and asked["scale"] == "cube_root":
            rule = asked["copies"] * chunks**2 / asked["moe_router_topk"]
            value = value.double() * rule ** (1 / 3)
        if asked["noise"]:
            value = value.double() + asked["noise"] * drawn(f"{label}/{name}")
        return value

    def _dense(self, model: int, layer: str, kind: str) -> Tensor:
        anchor = self.models[model].anchor
        own = "" if anchor is None else f"experts.{1 - anchor}."
        return self.models[model].get(f"model.layers.{layer}.mlp.{own}{kind}_proj.weight")

    def _before(self, expert: int) -> int:
        """The number that an expert had before another one was dropped."""
        if self.method != "drop":
            return expert
        return expert + (expert >= self._dropped)

    @property
    def _dropped(self) -> int:
        old = self.models[0].experts
        return old.index(self.asked["expert"])

    # ---- routers

    def _router(self, name: str, layer: str) -> Tensor:
        canonical = f"decoder.layers.{layer}.mlp.router.weight"
        if self.method in ("copy", "replace"):
            return self.models[0].get(name)
        if self.method == "drop":
            old = self.models[0].get(name)
            return torch.cat((old[: self._dropped], old[self._dropped + 1 :]))
        if self.method == "append":
            old = self.models[0].get(name)
            row = self._drawn(f"{canonical}/{self.labels[1]}", (1, old.shape[1]))
            return torch.cat((old.double(), row))
        if self.asked["router_init"] == "branches":
            return self._learned(name)
        hidden = len(self.models[0].get("model.norm.weight"))
        if self.asked["router_init"] in ("centroids", "ridge"):
            rows = self._centroids
            return torch.stack([rows[f"{canonical}/{expert}"] for expert in self.experts])
        if self.method == "upcycle":
            copies, chunks = self.asked["copies"], self.asked["num_chunks"]
            return self._drawn(canonical, (copies, hidden)).repeat_interleave(chunks, 0)
        return self._drawn(canonical, (len(self.experts), hidden))

    def _learned(self, name: str) -> Tensor:
        """Each branch's own row; for the seed the mean of what they learned for it."""
        rows = {label: model.get(name).double() for label, model in
                zip(self.labels, self.models, strict=True) if model.anchor is not None}  # fmt: skip
        anchors = {model.anchor for model in self.models if model.anchor is not None}
        (anchor,) = anchors
        shared = torch.stack([row[anchor] for row in rows.values()]).sum(0) / len(rows)
        return torch.stack([rows[e][1 - anchor] if e in rows else shared for e in self.experts])

    @cached_property
    def _centroids(self) -> dict[str, Tensor]:
        return load_file(str(self.centroids))

    def _drawn(self, name: str, shape: tuple[int, ...]) -> Tensor:
        kind, scale = self.asked["router_init"], self.asked["router_init_std"]
        if kind == "zeros":
            return torch.zeros(shape, dtype=torch.float64)
        if kind == "normal":
            return self._normal(name, shape) * scale
        return (self._uniform(name, shape) * 2 - 1) * scale

    # ---- random numbers, and where a tensor lies in the fused one over which they are drawn

    def _uniform(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, shape, lambda generator: generator.random(65536))

    def _normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._numbers(name, shape, lambda generator: generator.standard_normal(65536))

    def _numbers(self, name: str, shape: tuple[int, ...], draw: Any) -> Tensor:
        count = math.prod(shape)
        blocks = []
        for block in range(math.ceil(count / 65536)):
            word = f"{self.asked['random_seed']}/{name}/{block}"
            key = int.from_bytes(hashlib.sha256(word.encode()).digest()[:16], "little")
            blocks.append(draw(numpy.random.Generator(numpy.random.Philox(key=key))))
        return torch.from_numpy(numpy.concatenate(blocks)[:count]).reshape(shape)

    def _fused(self, name: str, part: Tensor) -> tuple[str, tuple[int, ...]]:
        """Megatron's name and shape of the tensor that holds ``part``."""
        if match := _HEADS.fullmatch(name):
            layer, _, which = match.groups()
            rows = sum(
                len(self.models[0].get(f"model.layers.{layer}.self_attn.{k}_proj.{which}"))
                for k in "qkv"
            )
            return f"decoder.layers.{layer}.self_attention.linear_qkv.{which}", (
                rows,
                *part.shape[1:],
            )
        if match := _FFN.fullmatch(name):
            layer, kind = match.groups()
            if kind == "down":
                return f"decoder.layers.{layer}.mlp.linear_fc2.weight", tuple(part.shape)
            return f"decoder.layers.{layer}.mlp.linear_fc1.weight", (
                2 * len(part),
                *part.shape[1:],
            )
        if name in _REST:
            return _REST[name], tuple(part.shape)
        _, _, layer, rest = name.split(".", 3)
        return f"decoder.layers.{layer}.{_REST[rest]}", tuple(part.shape)

    def _cut(self, name: str, fused: Tensor) -> Tensor:
        """What lies of ``name`` in Megatron's fused tensor: q, k, v group by group, gate above
        up."""
        if match := _HEADS.fullmatch(name):
            layer, kind, which = match.groups()
            rows = [
                len(self.models[0].get(f"model.layers.{layer}.self_attn.{k}_proj.{which}"))
                // self.models[0].groups
                for k in "qkv"
            ]
            at = "qkv".index(kind)
            by_group = fused.reshape(self.models[0].groups, sum(rows), *fused.shape[1:])
            return by_group[:, sum(rows[:at]) : sum(rows[: at + 1])].flatten(0, 1)
        match = _FFN.fullmatch(name)
        if match is None or match[2] == "down":
            return fused
        return fused.chunk(2)[match[2] == "up"]


def _check_rows(file: Path, digest: str | None) -> None:
    """That the file of router rows is the one that was mixed."""
    if not file.is_file():
        what = "the router rows that were mixed are not there"
        raise UserError(str(file), what, "put the file back to verify")
    if digest is not None and hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        what = "has changed since its router rows were mixed"
        raise UserError(str(file), what, "put the file back to verify")


def _chunk(whole: Tensor, kind: str, index: int, count: int) -> Tensor:
    """A range of the inner units: rows of gate and up, columns of down."""
    return whole.chunk(count, 1 if kind == "down" else 0)[index]


def _group(name: str) -> str:
    if "norm" in name:
        return "norms"
    if name.startswith("model.embed_tokens"):
        return "embeddings"
    if name.startswith("lm_head"):
        return "head"
    return "attention" if ".self_attn." in name else "ffn"


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest number of a floating ``dtype``, ties to even, of fp64; torch goes through fp32 to
    16 bits, and rounds twice. In fp64 multiples of the last digit are exact."""
    if values.dtype != torch.float64 or dtype == torch.float64:
        return values.to(dtype)
    kind, exact = torch.finfo(dtype), values.numpy()
    _, exponent = numpy.frexp(exact)
    digit = numpy.maximum(numpy.ldexp(kind.eps / 2, exponent), kind.tiny * kind.eps)
    return torch.as_tensor(numpy.rint(exact / digit) * digit).to(dtype)


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
