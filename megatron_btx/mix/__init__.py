"""The mixes: each is a page that returns a plan."""

from megatron_btx.mix.average import Averaging, Dare, average
from megatron_btx.mix.btx import btx
from megatron_btx.mix.copy import copy
from megatron_btx.mix.extend import append, drop
from megatron_btx.mix.router import RouterInit
from megatron_btx.mix.split import blend, split
from megatron_btx.mix.upcycle import upcycle

__all__ = [
    "Averaging",
    "Dare",
    "RouterInit",
    "append",
    "average",
    "blend",
    "btx",
    "copy",
    "drop",
    "split",
    "upcycle",
]
