"""Which of the two supported releases of Megatron-Core is installed, in what they differ, and which
of its warnings are not shown.

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
import logging
import warnings
from collections import defaultdict
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

SAVE_TAKES_STRATEGY = RELEASE >= (0, 19)
"""``dist_checkpointing.save`` is told whose asynchronous save it is to prepare: by default that of
``nvidia-resiliency-ext``. Not in 0.16; the releases between were not looked at."""

DDP_TAKES_LAYOUT = RELEASE >= (0, 19)
"""``DistributedDataParallel`` wants ``full_param_layout`` with the distributed optimizer. Not in
0.16; the releases between were not looked at."""


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


_SILENCED = (
    # Warnings about its own future that a user of this project can do nothing about.
    # (module of megatron.core, words in the message, why it may be)
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED", "CONTRIBUTING.md: a move to HybridModel"),
    (
        "dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
        "said of every save that is not asynchronous too",
    ),
    ("dist_checkpointing.strategies.common", "load_common is deprecated", "0.16 wrote common.pt"),
)


_SILENCED_WARNINGS = (
    # Said by several modules as they are imported: `btx doctor` says what a machine has, and
    # engine/platform.py what runs instead.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "MimoModelConfig is experimental",  # imported by Megatron itself, of no use here (0.19)
    "full scope is deprecated",  # about the default of an option that was not set (0.19)
    "Please use DTensor instead",  # torch, of Megatron's ShardedTensors, as a checkpoint is loaded
    "torch.distributed is disabled, unavailable or uninitialized",  # one rank reads for all
    # torch 2.13 has new names for them, which torch 2.10 lacks; Megatron calls them too.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
)
"""Begins of messages given to Python's ``warnings``, as regular expressions."""


def silence_warnings() -> None:
    """In this process, those of :data:`_SILENCED` and :data:`_SILENCED_WARNINGS`; before Megatron
    is imported."""
    for begin in _SILENCED_WARNINGS:
        warnings.filterwarnings("ignore", message=begin)
    words = defaultdict(list)
    for module, message, _ in _SILENCED:
        words[f"megatron.core.{module}"].append(message)
    for name, messages in words.items():
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Without) for each in logger.filters):
            logger.addFilter(_Without(messages))


class _Without(logging.Filter):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        text = record.getMessage()
        return not any(message in text for message in self.messages)
