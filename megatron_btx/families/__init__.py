"""Model families: their Hugging Face directories, both ways. Imports torch when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_btx.families.hf import FAMILIES, family_of, open_hf, to_hf

__all__ = ["FAMILIES", "family_of", "open_hf", "to_hf"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from megatron_btx.families import hf

    return getattr(hf, name)
