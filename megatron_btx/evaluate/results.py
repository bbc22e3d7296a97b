"""``results.json``: what was measured of every system of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.evaluate.routing_stats import CHOICES
from megatron_btx.files import parse_json, read_bytes, write_json

MEAN = "mean"
"""The column that is the mean over the domains."""

Matrix = list[list[float]]
"""``[layer][expert]``."""

_BYTES = 256 << 20
_MOST = 3e38
"""Above it is nothing that fp32 can have measured, and sums of two overflow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageCost:
    """What training one stage cost; ``None`` of a model that was taken and does not say."""

    tokens: int | None = None
    flops: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SystemResult:
    """One system: its losses, its size, what made it and what a token costs."""

    name: str
    """``seed``, ``expert:math``, ``dense``, ``btm``, ``upcycling`` or ``btx``."""
    loss: Mapping[str, float]
    """Nats per token by domain, and their ``mean``."""
    train_tokens: int | None = None
    """Over all stages that made it after the seed (the seed: itself), as ``train_flops``; ``None``
    where one of them does not say."""
    train_flops: int | None = None
    params_total: int | None = None
    params_active: int | None = None
    inference_flops_per_token: int | None = None
    stages: Mapping[str, StageCost] = field(default_factory=dict)
    checkpoint: tuple[str, ...] = ()
    """Relative to the run's directory; several of Branch-Train-Merge."""
    experts: tuple[str, ...] = ()
    """Of an MoE."""
    load: Mapping[str, Matrix] = field(default_factory=dict)
    """MoE: by domain, layer and expert, the share of the routed token slots (sums to 1 a layer)."""
    gate: Mapping[str, Matrix] = field(default_factory=dict)
    """MoE: likewise, the mean gate weight."""
    expert_choice: str | None = None
    """Of Sample Top-1, how one expert a token was taken: ``drawn`` or ``argmax``."""

    @property
    def moe_share(self) -> float | None:
        """Share of the training FLOPs spent on a mixture of experts (table 3 of the paper)."""
        if "finetune" not in self.stages:
            return 0.0
        mixture = self.stages["finetune"].flops
        if mixture is None or self.train_flops is None:
            return None
        return mixture / (self.train_flops or 1)

    def to_json(self) -> dict[str, Any]:
        """As in ``results.json``."""
        entry: dict[str, Any] = {"loss": dict(self.loss)}
        entry |= {name: getattr(self, name) for name in _COUNTS}
        entry["stages"] = {
            name: {"tokens": cost.tokens, "flops": cost.flops} for name, cost in self.stages.items()
        }
        one = len(self.checkpoint) == 1
        entry["checkpoint"] = self.checkpoint[0] if one else list(self.checkpoint)
        if self.load:
            entry |= {"load": dict(self.load), "gate": dict(self.gate)}
            entry["experts"] = list(self.experts)
        if self.expert_choice is not None:
            entry["expert_choice"] = self.expert_choice
        return entry

    @classmethod
    def from_json(cls, name: str, content: Any, where: str) -> SystemResult:
        """The reverse; what an earlier version did not store is ``None`` or empty.

        Raises:
            UserError: a value is of another kind.
        """
        read = _Reader(content, where)
        several = read.content.get("checkpoint") or []
        if not isinstance(several, str | list):
            raise damaged(where, f"checkpoint is {_shown(several)}")
        experts = tuple(map(str, read.value("experts", list, [])))
        load, gate = read.mapping("load", _matrix), read.mapping("gate", _matrix)
        _check_routing(where, load, gate, len(experts))
        return cls(
            name=name,
            loss=read.mapping("loss", _number, needed=True),
            **{key: read.count(key) for key in _COUNTS},
            stages=read.mapping("stages", _cost),
            checkpoint=(several,) if isinstance(several, str) else tuple(map(str, several)),
            experts=experts,
            load=load,
            gate=gate,
            expert_choice=read.one_of("expert_choice", CHOICES),
        )


_COUNTS = (
    *("train_tokens", "train_flops", "params_total", "params_active"),
    "inference_flops_per_token",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Of a run."""

    recipe: str
    domains: tuple[str, ...]
    systems: Mapping[str, SystemResult]
    text: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By domain the ``tokens`` and ``sha256`` of the held-out text; empty of an earlier version."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The domains, and ``mean`` last."""
        return (*self.domains, MEAN)

    def to_json(self) -> dict[str, Any]:
        """As in ``results.json``."""
        return {
            "recipe": self.recipe,
            "domains": list(self.domains),
            "text": {name: dict(text) for name, text in self.text.items()},
            "systems": {name: system.to_json() for name, system in self.systems.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> Results:
        """The reverse.

        Raises:
            UserError: it is damaged.
        """
        read = _Reader(content, where)
        if not isinstance(content.get("systems"), dict) or not content["systems"]:
            raise damaged(where, "it holds no systems")
        systems = {
            name: SystemResult.from_json(name, entry, f"{where}: systems.{name}")
            for name, entry in content["systems"].items()
        }
        named = [str(name) for name in read.value("domains", list, [])]
        named += [name for system in systems.values() for name in system.loss]
        return cls(
            recipe=read.value("recipe", str, ""),
            domains=tuple(name for name in dict.fromkeys(named) if name != MEAN),
            systems=systems,
            text=read.mapping("text", _text),
        )

    def write(self, path: Path) -> None:
        """Write ``results.json``."""
        write_json(path, self.to_json())

    @classmethod
    def read(cls, run_dir: Path) -> Results | None:
        """A run's; ``None`` before there is any.

        Raises:
            UserError: it is damaged.
        """
        path = run_dir / "results.json"
        if not path.exists():
            return None
        try:
            content = parse_json(read_bytes(path, _BYTES), str(path))
        except UserError as error:
            raise damaged(str(path), error.what) from None
        return cls.from_json(content, str(path))


def damaged(where: str, what: str) -> UserError:
    """The error for a results file that cannot be read."""
    again = "remove it and the run's evaluate/; `btx run` makes both again"
    return UserError(where, f"is damaged: {what}", again)


class _Reader:
    """The values of a JSON object, each of its kind."""

    def __init__(self, content: Any, where: str) -> None:
        if not isinstance(content, dict):
            raise damaged(where, "it is no mapping")
        self.content, self.where = content, where

    def value(self, key: str, kind: type, default: Any) -> Any:
        """A value of a kind; ``default`` where there is none."""
        found = self.content.get(key)
        if found is None:
            return default
        if not isinstance(found, kind):
            raise damaged(self.where, f"{key} is {_shown(found)}")
        return found

    def one_of(self, key: str, known: Collection[str]) -> str | None:
        """One of the ``known`` words."""
        found: str | None = self.value(key, str, None)
        if found is not None and found not in known:
            raise damaged(self.where, f"{key} is {_shown(found)}")
        return found

    def count(self, key: str) -> int | None:
        """A whole number, not negative."""
        found = self.content.get(key)
        if found is None:
            return None
        _not_negative(found, f"{self.where}.{key}")
        return int(found)

    def mapping(
        self, key: str, read: Callable[[Any, str], Any], *, needed: bool = False
    ) -> dict[str, Any]:
        """A mapping whose values ``read`` reads."""
        found = self.content.get(key)
        if found is None and not needed:
            return {}
        if not isinstance(found, dict):
            raise damaged(self.where, f"{key} is {_shown(found)}, no mapping")
        return {name: read(value, f"{self.where}.{key}.{name}") for name, value in found.items()}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise damaged(where, f"it is {_shown(value)}, no number")
    if not abs(value) <= _MOST:  # NaN is not
        raise damaged(where, f"it is {_shown(value)}, which nothing that was measured can be")
    return float(value)


def _not_negative(value: Any, where: str) -> float:
    if (number := _number(value, where)) < 0:
        raise damaged(where, f"it is {_shown(value)}, which is negative")
    return number


def _cost(value: Any, where: str) -> StageCost:
    read = _Reader(value, where)
    return StageCost(tokens=read.count("tokens"), flops=read.count("flops"))


def _text(value: Any, where: str) -> dict[str, Any]:
    read = _Reader(value, where)
    tokens = read.count("tokens")
    if tokens is None:
        raise damaged(where, "it has no tokens")
    return {"tokens": tokens, "sha256": read.value("sha256", str, "")}


def _matrix(value: Any, where: str) -> Matrix:
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        raise damaged(where, f"it is {_shown(value)}, no matrix")
    rows = [[_not_negative(each, where) for each in row] for row in value]
    if not rows or len({len(row) for row in rows}) > 1 or not all(rows):
        raise damaged(where, "its rows are not equally long")
    return rows


def _check_routing(where: str, load: Any, gate: Any, experts: int) -> None:
    """That both are of the same domains, layers and experts."""
    shapes = {(len(matrix), len(matrix[0])) for matrix in (*load.values(), *gate.values())}
    if load.keys() != gate.keys() or len(shapes) > 1 or any(e != experts for _, e in shapes):
        raise damaged(where, "load, gate and experts do not belong to one model")


def _shown(value: Any) -> str:
    return repr(value)[:60]
