"""What the converters share."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Literal

from megatron_btx.errors import UserError
from megatron_btx.mix.command import Request


def main(description: str | None, form: Literal["hf", "megatron"]) -> int:
    """Copy the checkpoint that the command line names into ``form``."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="the checkpoint")
    parser.add_argument("out", metavar="OUT", help="the new directory")
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="of the result")
    parser.add_argument("--memory", default="", help="peak resident memory, such as 2GiB")
    given = parser.parse_args()
    options: dict[str, Any] = {"dtype": given.dtype, "memory": given.memory}
    request = Request(
        sources=(f"model={given.source}",), out=given.out, method="copy", format=form, **options
    )
    from megatron_btx.mix import offline

    try:
        offline.run(request, sys.stdout)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
