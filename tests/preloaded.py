"""Imported once by the process from which the ranks of a pool are forked (ranks.py)."""

from megatron_btx import engine

with engine.importing():
    import torch._dynamo  # noqa: F401  # torch's optimizers ask for it when they are made

    from megatron_btx.evaluate import evaluate_stage, export  # noqa: F401
    from megatron_btx.train import train_stage  # noqa: F401
