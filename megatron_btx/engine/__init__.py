"""All that touches Megatron-Core."""


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
