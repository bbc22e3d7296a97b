"""Positions in a ``config.json``: their number, RoPE and its scaling, and windows of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_btx.families.config import ConfigReading
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import windows


@dataclass(frozen=True)
class Positions:
    """``max_position_embeddings``: for what the model was made. Training begins with as much."""

    def read(self, reading: ConfigReading) -> None:
        """Also our ``seq_length``, which a recipe may lower."""
        value = reading.need("max_position_embeddings")
        for ours in ("max_position_embeddings", "seq_length"):
            reading.model[ours] = value
            reading.keys[ours] = "max_position_embeddings"

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """What it was made for, or was trained on."""
        model = architecture.model
        return {"max_position_embeddings": model.max_position_embeddings or model.seq_length}


_ROPE = ("rope_scaling", "rope_parameters")
_ONE = "keep the one that the model was trained with, in a copy of the directory's config.json"


def _words(rope: Mapping[str, Any]) -> str:
    """What a mapping says, to be compared; ``type`` is an older word for ``rope_type``."""
    named = {{"type": "rope_type"}.get(key, key): value for key, value in rope.items()}
    numbers = {k: float(v) if isinstance(v, int) else v for k, v in named.items() if v is not None}
    return repr(sorted(numbers.items()))


@dataclass(frozen=True)
class Rope:
    """Rotary positions: ``rope_theta`` and ``rope_scaling`` as transformers 4 has them, or
    ``rope_parameters`` as 5 does. Written in the older form, which both read."""

    default_theta: float
    kinds: tuple[str, ...] = ("default", "llama3", "linear")
    """Scalings that the family's class in ``transformers`` takes, of those that are computed."""

    LLAMA3 = {  # noqa: RUF012
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    """What Megatron's ``rope_scaling`` has for these."""

    def read(self, reading: ConfigReading) -> None:
        """Base and scaling, from wherever they stand."""
        rope = self._scaling(reading)
        if any(isinstance(value, Mapping) for value in rope.values()):
            what = f"rope_scaling or rope_parameters is {rope}"
            reading.refuse(f"{what}: other positions in other layers")
            return
        kinds = {str(rope.pop(key, None)) for key in ("rope_type", "type")} - {"None"}
        kind = " and ".join(sorted(kinds)) if kinds else "default"
        rope = {key: value for key, value in rope.items() if value is not None}
        for key, value in (("partial_rotary_factor", 1.0), ("attention_factor", 1.0)):
            if rope.pop(key, value) != value:
                reading.refuse(f"{key} of rope_scaling is not {value}")
        for key, value in self.LLAMA3.items() if kind == "llama3" else ():
            if rope.pop(key, None) != value:
                reading.refuse(f"{key} of rope_scaling is not {value}, as Megatron has it")
        factor = rope.pop("factor", None)
        what = f"rope_scaling of type {kind}"
        if kind not in self.kinds:
            reading.refuse(f"{what}; of this family {', '.join(self.kinds)} can be computed")
        elif rope or (kind != "default") != (factor is not None):
            reading.refuse(f"{what} with {rope or factor}")
        elif kind == "llama3":
            reading.model |= {"rope_scaling": True, "rope_scaling_factor": factor}
            reading.keys["rope_scaling_factor"] = "rope_scaling.factor"
        elif kind == "linear":
            reading.model["seq_len_interpolation_factor"] = factor
            reading.keys["seq_len_interpolation_factor"] = "rope_scaling.factor"

    def _scaling(self, reading: ConfigReading) -> dict[str, Any]:
        """The scaling, without the base, which becomes the model's. ``transformers`` 4 and 5 look
        in different places: where several speak, they must say the same."""
        places = {key: reading.typed(dict[str, Any], key, {}) for key in _ROPE}
        told = {key: rope for key, rope in places.items() if rope}
        base = reading.take("rope_theta", self.default_theta)
        bases = [] if told and reading.take("rope_theta") is None else [base]
        for rope in told.values():
            own = rope.pop("rope_theta", None)
            bases.append(base if own is None else own)
        if any(one != bases[0] for one in bases):
            reading.refuse(f"rope_theta is {' and '.join(map(str, bases))}", _ONE)
        elif len({_words(rope) for rope in told.values()}) > 1:
            reading.refuse(" and ".join(f"{key} is {rope}" for key, rope in told.items()), _ONE)
        reading.model["rotary_base"] = bases[0]
        reading.keys["rotary_base"] = "rope_theta"
        return next(iter(told.values()), {})

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """``rope_theta``, and ``rope_scaling`` where there is one."""
        model = architecture.model
        rope: dict[str, Any] = {"rope_theta": model.rotary_base}
        if model.rope_scaling:
            own = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **self.LLAMA3}
            return rope | {"rope_scaling": own}
        if (factor := model.seq_len_interpolation_factor) is not None:
            return rope | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
        return rope


@dataclass(frozen=True)
class NoRope:
    """``no_rope_layers``: 1 for every layer *with* rotary positions; Megatron's is the opposite."""

    def read(self, reading: ConfigReading) -> None:
        """Where it is absent, every ``no_rope_layer_interval``-th layer has none."""
        layers = reading.typed(int, "num_hidden_layers", 0, high=10_000)
        interval = reading.typed(int, "no_rope_layer_interval", 4, low=1)
        rotated = reading.typed(tuple[int, ...], "no_rope_layers", None)
        if rotated is None:
            rotated = [int((layer + 1) % interval != 0) for layer in range(layers)]
        if len(rotated) < layers or set(rotated) - {0, 1}:
            reading.refuse(f"no_rope_layers is {list(rotated)} for {layers} layers")
        elif not all(rotated[:layers]):
            reading.model["no_rope_freq"] = tuple(1 - each for each in rotated[:layers])
            reading.keys["no_rope_freq"] = "no_rope_layers"

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Every layer's."""
        model = architecture.model
        skipped = model.no_rope_freq or (0,) * model.num_layers
        return {"no_rope_layers": [1 - each for each in skipped]}


def _read_window(reading: ConfigReading, absent: int | None) -> int | None:
    """``sliding_window``, of which null is no window; ``absent``: what ``transformers`` takes where
    the key is not there."""
    seen: int | None = reading.typed(int, "sliding_window", None)
    return seen if "sliding_window" in reading.config else absent


def _set_window(reading: ConfigReading, seen: int) -> None:
    """As Megatron's ``window_size``, which does not count the token itself."""
    if seen == 0:  # where it counts: Qwen2-MoE's says 0 where it is switched off
        reading.refuse("sliding_window is 0", "give at least 1, or null for no window")
        return
    reading.model["window_size"] = (seen - 1, 0)
    reading.keys["window_size"] = "sliding_window"


@dataclass(frozen=True)
class Window:
    """``sliding_window`` of every layer: W tokens, itself among them; null: no window."""

    absent: int | None = None
    """What ``transformers`` takes where the key is not there at all."""
    switch: bool = False
    """Whether it counts only under ``use_sliding_window``."""

    def read(self, reading: ConfigReading) -> None:
        """Of every layer."""
        seen = _read_window(reading, self.absent)
        if self.switch:
            first = reading.typed(int, "max_window_layers", 0)
            if not reading.typed(bool, "use_sliding_window", False):
                seen = None
            elif first != 0 and seen is not None:
                what = f"use_sliding_window is on and max_window_layers {first!r}"
                reading.refuse(f"{what}: the versions of transformers disagree about what it means")
        if seen is not None:
            _set_window(reading, seen)

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The window, where all layers have it."""
        seen = set(windows(architecture.model))
        value = seen.pop() if len(seen) == 1 else None
        switch = {"use_sliding_window": value is not None} if self.switch else {}
        return {"sliding_window": value, **switch}


@dataclass(frozen=True)
class LayerWindows:
    """Qwen2's, Qwen3's and SmolLM3's windows: ``layer_types`` names the layers that have one."""

    from_layer: bool
    """Whether, without ``layer_types``, the layers from ``max_window_layers`` on are meant; the
    versions of ``transformers`` disagree about Qwen2-MoE's."""
    absent: int | None = 4096
    """What ``transformers`` takes for an absent ``sliding_window``."""

    def read(self, reading: ConfigReading) -> None:
        """``window_size``, and which layers where not all have it."""
        types = reading.typed(tuple[str, ...], "layer_types", None)
        on = reading.typed(bool, "use_sliding_window", False)
        seen = _read_window(reading, self.absent)
        full = reading.typed(int, "max_window_layers", 28)
        layers = reading.typed(int, "num_hidden_layers", 0, high=10_000)
        if not on:
            if types and set(types) != {"full_attention"}:
                reading.refuse("layer_types has windows, use_sliding_window is not on")
            return
        if types is None and seen is None:
            return
        if types is None:
            if not self.from_layer:
                reading.refuse("use_sliding_window is on without layer_types: in which layers?")
                return
            names = ["full_attention", "sliding_attention"]
            types = [names[layer >= full] for layer in range(layers)]
        if len(types) != layers or set(types) - {"full_attention", "sliding_attention"}:
            reading.refuse(f"layer_types is {types} for {layers} layers")
            return
        freq = tuple(int(kind == "sliding_attention") for kind in types)
        if any(freq) and seen is None:
            reading.refuse("layer_types has windows, and there is no sliding_window")
        elif seen is not None and any(freq):
            _set_window(reading, seen)
        if any(freq) and not all(freq):
            reading.model["window_attn_skip_freq"] = freq

    def write(self, architecture: Architecture) -> dict[str, Any]:
        """The window and the layers' kinds."""
        seen = windows(architecture.model)
        wide = next(filter(None, seen), None)
        if wide is None:
            return {"use_sliding_window": False, "sliding_window": None}
        kinds = ["full_attention" if window is None else "sliding_attention" for window in seen]
        first = next(at for at, window in enumerate(seen) if window)
        return {
            "use_sliding_window": True,
            "sliding_window": wide,
            "max_window_layers": first,
            "layer_types": kinds,
        }
