"""``btx doctor``: what this machine has. Imports torch to see what torch sees."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli.common import command
from megatron_btx.files import json_text

_EPILOG = """examples:
  btx doctor                       what is here, and what that gives
  btx doctor --dir /scratch/me     measure the disk that runs will be on
  btx doctor --json

exit codes: 0 it can train, 1 it cannot (the first line says what is missing)"""


def add_parser(commands: Any) -> None:
    """Add ``doctor`` to the command line."""
    parser = command(
        commands, "doctor", "what this machine has, and which features that gives", _EPILOG
    )
    parser.add_argument(
        "--dir",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="directory on the disk to measure (.)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx doctor``.

    Raises:
        UserError: the directory cannot be written to.
    """
    from megatron_btx.pipeline import doctor

    found = doctor.examine(options.dir)
    facts, features = found["facts"], found["features"]
    if options.json:
        listed = [dataclasses.asdict(feature) for feature in features]
        sys.stdout.write(json_text({"facts": facts, "features": listed}, indent=1) + "\n")
    else:
        wide = max(len(feature.name) for feature in features)
        lines = [
            f"{'yes' if one.works else 'no ':3}  {one.name:{wide}}  {one.why}" for one in features
        ]
        sys.stdout.write("\n".join([*lines, "", *_about(facts)]) + "\n")
    return 0 if all(feature.works for feature in features if feature.needed) else 1


def _about(facts: dict[str, Any]) -> list[str]:
    disk = facts["disk"]
    speeds = [disk[f"{kind}_bytes_per_second"] / 1e6 for kind in ("write", "read")]
    memory = facts["memory_bytes"] / 2**30
    return [
        f"Python {facts['python']['version']} ({facts['python']['executable']})",
        f"{facts['cores']} cores, {memory:.1f} GiB of memory",
        *(f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.1f} GiB" for gpu in facts["gpus"]),
        f"{disk['directory']}: {disk['free_bytes'] / 1e9:.1f} GB free; "
        f"writes {speeds[0]:,.0f} MB/s, reads {speeds[1]:,.0f} MB/s",
    ]
