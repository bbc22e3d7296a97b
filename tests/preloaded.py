"""Imported once by the process from which the ranks of a pool are forked (ranks.py)."""

from megatron_btx.pipeline.local import fork_server

assert fork_server.preload()
