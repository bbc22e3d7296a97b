"""All that touches Megatron-Core."""

import contextlib
import gc
from collections.abc import Iterator


def install() -> None:
    """Let Megatron-Core run on this machine, with what it is given here: without CUDA, or with a
    GPU but without Transformer Engine or Apex. Call it before any other import of Megatron.

    Raises:
        LookupError: an upstream symbol that we replace is gone from this Megatron-Core.
    """
    from megatron_btx.engine import cpu

    cpu.install()
    from megatron_btx.engine import mcore_patches, platform

    mcore_patches.install(platform.detect())


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For a process that is a rank, or simulates one: import torch and Megatron as this platform
    needs them, then what the block imports, and have the garbage collector leave all of it alone
    from then on.

    Half a million objects are made, none of them garbage. Looking for some costs a rank a third of
    its start, in the imports and once more at its end.
    """
    gc.disable()
    try:
        from megatron_btx.engine import cpu

        cpu.install()
        yield
    finally:
        gc.freeze()
        gc.enable()
