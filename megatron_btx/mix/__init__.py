"""The paper's mixes: each is a page that returns a plan."""

from megatron_btx.mix.btx import RouterInit, btx

__all__ = ["RouterInit", "btx"]
