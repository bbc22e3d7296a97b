"""Model families: their Hugging Face directories, both ways."""

from megatron_btx.families.hf import FAMILIES, family_of, open_hf, to_hf

__all__ = ["FAMILIES", "family_of", "open_hf", "to_hf"]
