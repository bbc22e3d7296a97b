"""Which of the two supported releases of Megatron-Core is installed, and in what they differ.

| Python     | megatron-core | named by                                        |
| ---------- | ------------- | ----------------------------------------------- |
| 3.11       | 0.16.1        | the markers in `setup.py` and `constraints.txt` |
| 3.12, 3.13 | 0.19.2        | the same                                        |

Code asks for a capability below, never for a number; each says the release of Megatron-Core that
brought it (read off the wheels 0.16.1, 0.17.1, 0.18.0 and 0.19.2). What is replaced in upstream
differs too: the tables of engine/cpu.py and engine/mcore_patches.py are kept by :data:`RELEASE`.
"""

from __future__ import annotations

import functools
from importlib import metadata

from megatron_btx.errors import UserError

SUPPORTED = ((0, 16), (0, 19))


@functools.cache
def version() -> str:
    """The installed megatron-core, as its package says."""
    return metadata.version("megatron-core")


RELEASE = tuple(int(part) for part in version().split(".")[:2])
"""(0, 16) or (0, 19); see :func:`require_supported`."""

PERMUTE_RETURNS_PADDING = RELEASE >= (0, 17)
"""``moe_utils.permute`` returns five values: two more, which say how rows were padded."""

MOE_SPEC_IS_PARTIAL = RELEASE >= (0, 18)
"""The MoE part of a layer spec is a ``functools.partial`` over its submodules (a ``ModuleSpec``
before), and ``MLP.as_mlp_submodule`` builds the dense one."""

MOE_METRICS_TRACKER = RELEASE >= (0, 18)
"""Auxiliary losses are kept in ``moe_logging.MoEMetricsTracker`` (a dictionary before)."""


def require_supported() -> None:
    """That the installed release is one that this project is tested with.

    Raises:
        UserError: it is another one.
    """
    if RELEASE not in SUPPORTED:
        raise UserError(
            "megatron-core",
            f"{version()} is installed; 0.16.1 (Python 3.11) and 0.19.2 (Python 3.12 and 3.13) are "
            "supported",
            "pip install -c constraints.txt megatron-core",
        )
