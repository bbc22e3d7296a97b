"""Branch-Train-MiX (arXiv 2403.07816) on Megatron-Core.

The public names are listed in :data:`API` and described in docs/api.md; each is imported when it is
first used, so that ``import megatron_btx`` costs nothing and needs no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

API = {
    "recipe.load": ("load_recipe", "parse_recipe"),
    "recipe.schema": ("Recipe", "Model", "Training", "Layout", "Mix", "Routing"),
    "recipe.architecture": ("Architecture",),
    "recipe.run_plan": ("plan",),
    "weights.plan": ("Checkpoint", "Plan"),
    "weights.write_sharded_model": ("load_into_sharded",),
    "weights.write_torch_dist": ("write_torch_dist",),
    "families.open_checkpoint": ("open_checkpoint",),
    "families.export": ("write_hf",),
    "mix.average": ("Averaging", "average"),
    "mix.btx": ("btx",),
    "mix.upcycle": ("upcycle",),
    "mix.split": ("split", "blend"),
    "mix.edit_experts": ("append", "drop", "replace_expert"),
    "mix.router_init": ("RouterInit",),
    "mix.plans": ("mix_plan",),
    "engine": ("install",),
    "engine.model": ("transformer_config", "build_model"),
    "engine.spec": ("layer_spec", "block_spec"),
    "engine.megatron_lm_spec": ("megatron_lm_spec",),
    "engine.moe.router": ("BTXRouter", "forced_routing"),
    "engine.moe.router_config": ("transformer_fields",),
    "engine.initializer": ("initialize",),
    "errors": ("UserError", "UserErrors"),
}
"""Public names by the module that defines them."""

_MODULE_OF = {name: module for module, names in API.items() for name in names}

__all__ = ["API", "__version__", *_MODULE_OF]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
