"""Warnings of Megatron-Core that are about its own future and that a user of this project can do
nothing about: silenced one by one, by their words. All others are shown."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict

_SILENCED = (
    # (module of megatron.core, words in the message, why it may be)
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED", "CONTRIBUTING.md: a move to HybridModel"),
    (
        "distributed.distributed_data_parallel",
        "full_param_layout not provided",
        "the layout that it computes by itself is the one that we would hand it",
    ),
    (
        "dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
        "said of every save that is not asynchronous too",
    ),
    ("dist_checkpointing.strategies.common", "load_common is deprecated", "0.16 wrote common.pt"),
)


_SILENCED_WARNINGS = (
    "full scope is deprecated",  # the default of an option that nobody set (0.19)
    "torch.distributed is disabled, unavailable or uninitialized",  # one rank reads for all
)
"""Begins of messages given to Python's ``warnings``."""


def install() -> None:
    """Silence them, in this process."""
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
