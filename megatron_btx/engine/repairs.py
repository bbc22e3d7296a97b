"""Repairs of Megatron-Core 0.16.1 that any machine without Transformer Engine needs, GPU or not.

Each row of ``install`` says its condition; where the fused libraries are present nothing is done.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from megatron_btx.engine.kernels import Platform


@functools.cache
def install(platform: Platform) -> None:
    """Apply what this platform needs. Call it after ``cpu.install()``, before building a model."""
    if not platform.use_transformer_engine:
        # Bound only inside `try: import transformer_engine`, then read by router_gating_linear.
        _bind("megatron.core.transformer.moe.moe_utils", te_general_gemm=None)
    if platform.optimizer == "torch":
        # torch's AdamW keeps `step` per tensor, the fused ones per group, and the distributed
        # optimizer's checkpoints are written for the latter: `KeyError: 'step'` when loading.
        from megatron_btx.engine.adam import Adam

        _bind("megatron.core.optimizer", Adam=Adam, USING_PYTORCH_OPTIMIZER=False)
        _bind(
            "megatron.core.optimizer.distrib_optimizer",
            Adam=Adam,
            HAVE_APEX_OR_TE=True,
            USING_APEX_OPTIMIZER=True,
        )


def _bind(module_name: str, **names: Any) -> None:
    module = importlib.import_module(module_name)
    for name, value in names.items():
        setattr(module, name, value)
