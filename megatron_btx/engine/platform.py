"""Which kernels a machine has: one pure function from what is installed to what is used.

| CUDA | Transformer Engine | Apex | layers             | optimizer          | run on hardware |
| ---- | ------------------ | ---- | ------------------ | ------------------ | --------------- |
| no   | any                | any  | torch              | torch              | yes             |
| yes  | no                 | no   | torch              | torch              | not run         |
| yes  | no                 | yes  | torch              | apex               | not run         |
| yes  | yes                | any  | transformer_engine | transformer_engine | not run         |
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Platform:
    """What is there. Everything that is *used* follows from these three facts."""

    cuda: bool
    transformer_engine: bool
    apex: bool
    """NVIDIA's Apex, built from source; the package of that name on the index does not count."""

    @property
    def use_transformer_engine(self) -> bool:
        """Layers from Transformer Engine (CUDA only)."""
        return self.cuda and self.transformer_engine

    @property
    def layers(self) -> Literal["transformer_engine", "torch"]:
        """Whose layers: Megatron's Transformer Engine spec, or ours on plain torch, with
        ``scaled_dot_product_attention`` (on a CPU engine/ops/cpu_attention.py) and
        ``grouped_mm``."""
        return "transformer_engine" if self.use_transformer_engine else "torch"

    @property
    def optimizer(self) -> Literal["transformer_engine", "apex", "torch"]:
        """Whose Adam, in Megatron's own order of preference."""
        if self.use_transformer_engine:
            return "transformer_engine"
        return "apex" if self.cuda and self.apex else "torch"


@functools.cache
def detect() -> Platform:
    """What this machine has. A package counts when it imports, not when it is listed."""
    import torch

    cuda = torch.cuda.is_available()
    return Platform(
        cuda=cuda,
        transformer_engine=cuda and _imports("transformer_engine.pytorch"),
        apex=_nvidia_apex(),
    )


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _nvidia_apex() -> bool:
    if importlib.util.find_spec("apex") is None:
        return False
    if _imports("apex.optimizers") and _imports("amp_C"):
        return True
    logger.warning(
        "the installed package 'apex' is not NVIDIA's Apex (an unrelated project has that name on "
        "the package index); it is ignored. NVIDIA Apex is built from source."
    )
    return False
