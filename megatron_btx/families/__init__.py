"""Model families: their Hugging Face directories, both ways."""

from megatron_btx.families.hf import open_hf, to_hf
from megatron_btx.families.llama import LLAMA
from megatron_btx.families.mixtral import MIXTRAL

__all__ = ["LLAMA", "MIXTRAL", "open_hf", "to_hf"]
