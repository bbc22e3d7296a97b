"""What the converters share: both are the mix of one model with nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, Literal

from megatron_btx.errors import UserError
from megatron_btx.mix.request import MixRequest
from megatron_btx.provenance import code_revision


class Arguments(argparse.Namespace):
    """What both take."""

    source: str
    out: str | None
    dtype: Literal["bf16", "fp32", "fp16"] | None
    memory: str
    shard: str
    format: str = ""
    fused: bool = False


def parser(description: str | None, source: str, help: str) -> argparse.ArgumentParser:
    """The arguments of both."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("source", metavar=source, help=help)
    made.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the result")
    made.add_argument("--memory", default="", help="peak resident memory, such as 2GiB")
    made.add_argument("--shard", default="1GiB", help="size of a file: what a kill loses at most")
    return made


def reported(work: Callable[[], None]) -> int:
    """Do it; a user's mistake is told without a traceback."""
    try:
        work()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def convert(given: Arguments, form: Literal["hf", "megatron"]) -> None:
    """Copy the checkpoint that the command line names into ``form``."""
    from megatron_btx.mix import offline

    options: dict[str, Any] = {
        name: getattr(given, name) for name in ("dtype", "memory", "shard", "fused")
    }
    request = MixRequest(
        sources=(f"model={given.source}",),
        out=str(given.out),
        method="copy",
        format=form,
        family=given.format,
        **options,
    )
    offline.run(request, sys.stdout, code_revision())
