"""Megatron-Bridge 0.6.2 without a GPU and without the half of its requirements that need one.

What is replaced is replaced in this process alone, and decides nothing that is stored: its package
``__init__`` files, which import every family and diffusion; Transformer Engine's layers, whose
weights Megatron's local layers store under the same names; fusions of kernels that a CPU lacks.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

from megatron_btx.engine import cpu

FAMILIES = ("llama.llama_bridge", "qwen.qwen3_bridge", "qwen.qwen3_moe_bridge")
_ABSENT = ("megatron.energon", "nvidia_resiliency_ext.inprocess", "PIL", "torchvision",
           "qwen_vl_utils", "mlflow", "comet_ml")  # fmt: skip
_TE = ("transformer_engine", "transformer_engine.pytorch")
_FUSIONS = {"persist_layer_norm": False, "moe_grouped_gemm": False, "moe_permute_fusion": False}


def auto_bridge() -> Any:
    """Its class ``AutoBridge``, ready for import and export on one gloo rank."""
    cpu.install()
    importlib.import_module("megatron.core.post_training.modelopt.gpt.model_specs")
    root = _place()
    bridge = _package("megatron.bridge", root)
    models = _package("megatron.bridge.models", root / "models")
    bridge.models = models  # type: ignore[attr-defined]
    _with_stand_ins("megatron.bridge.peft.lora_layers")
    found = importlib.import_module("megatron.bridge.models.conversion.auto_bridge")
    for family in FAMILIES:
        importlib.import_module(f"megatron.bridge.models.{family}")
    provider = importlib.import_module("megatron.bridge.models.gpt_provider")
    models.GPTModelProvider = provider.GPTModelProvider  # type: ignore[attr-defined]
    models.__getattr__ = _class_of_any_name  # type: ignore[attr-defined]
    sys.meta_path.append(_StandIns())  # last: only what is not installed
    _torch_layers(provider)
    return found.AutoBridge


def _place() -> Path:
    import megatron

    for place in megatron.__path__:
        if (Path(place) / "bridge").is_dir():
            return Path(place) / "bridge"
    raise ModuleNotFoundError("megatron.bridge: see docs/megatron.md for its environment")


def _package(name: str, path: Path) -> types.ModuleType:
    """A package without what its ``__init__`` imports."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(path)]
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    return made


class _AnyName(type):
    """Of a class whose attributes are classes: what only class bodies and annotations name."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


def _class_of_any_name(name: str) -> Any:
    if name.startswith("_") or not name[0].isupper():
        raise AttributeError(name)
    return _AnyName(name, (), {})


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _StandIns:
    """Finds every module that is not installed and that import or export never calls."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if not any(name == one or name.startswith(f"{one}.") for one in _ABSENT):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


def _with_stand_ins(name: str) -> None:
    """Import a module that asks for Transformer Engine's classes to derive from them."""
    made = {one: _StandIn(one) for one in _TE}
    for one, module in made.items():
        module.__spec__ = importlib.machinery.ModuleSpec(one, None, is_package=True)
    made[_TE[0]].pytorch = made[_TE[1]]  # type: ignore[attr-defined]
    sys.modules |= made
    try:
        importlib.import_module(name)
    finally:
        for one in made:
            del sys.modules[one]


def _torch_layers(provider: Any) -> None:
    """Megatron's local layers in place of Transformer Engine's; the configuration that is saved
    keeps what the family set."""
    provider.transformer_engine_layer_spec = provider.local_layer_spec
    rope = importlib.import_module("megatron.core.models.common.embeddings.rope_utils")
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        if getattr(rope, name, None) is None:  # apply_rope_fusion asks that they be there
            setattr(rope, name, _never_called)
    owner = provider.GPTModelProvider
    for method in ("finalize", "provide"):
        setattr(owner, method, _without_fusions(getattr(owner, method)))


def _without_fusions(method: Any) -> Any:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = {name: getattr(self, name) for name in _FUSIONS}
        vars(self).update(_FUSIONS)
        try:
            return method(self, *args, **kwargs)
        finally:
            vars(self).update(kept)

    return called


def _never_called(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("nothing is computed here")
