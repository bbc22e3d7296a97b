"""``btx centroids``: the file from which ``router_init: centroids`` is made. Imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import command
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.files import check_file
from megatron_btx.pipeline import eval_ranks

_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --router-init zeros --out MOE
  btx centroids MOE --data code=code.jsonl math=math.jsonl seed=web.jsonl \\
    --out centroids.safetensors
  btx mix --sources code=DIR math=DIR seed=DIR --router-init centroids \\
    --centroids centroids.safetensors --out MIXTRAL

Each text is read twice, all of it forced to the expert of its name. A recipe takes the file too:
`mix: {router_init: centroids, centroids: centroids.safetensors}`."""


def add_parser(commands: Any) -> None:
    """Add ``centroids`` to the command line."""
    parser = command(
        commands,
        "centroids",
        "routers that know their experts' domains: mean inputs of each, for btx mix",
        _EPILOG,
        "Write the mean feed-forward input of every expert's domain, for routers.",
    )
    parser.add_argument("checkpoint", metavar="MOE", help="the mixed model, of either format")
    model_flags.add_text_flags(
        parser,
        "EXPERT=FILE[,FILE]",
        "JSONL files and directories of every expert's domain",
        tokens=65536,
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the new file")
    parser.add_argument(
        "--spread",
        metavar="S",
        type=float,
        default=1.0,
        help="standard deviation over the experts of a token's logits (1)",
    )
    model_flags.add_model_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, no table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    model_flags.check_numbers(options)
    subjects = model_spec.parse([options.checkpoint])
    if subjects[0].method is not None:
        raise UserError(subjects[0].name, "is a set of models: it has no router", "give one model")
    if not options.spread > 0:
        raise UserError("--spread", f"is {options.spread}", "give a positive number")
    if options.out.exists():
        raise UserError(str(options.out), "exists already", "remove it, or give another name")
    check_file(options.out)
    request = eval_ranks.request_of(
        "centroids",
        subjects,
        model_flags.layout_of(options.layout),
        data=model_flags.data_of(options.data),
        setting={**model_flags.setting_of(options), "tokens": options.tokens},
        spread=options.spread,
        out=str(options.out.absolute()),
    )
    try:
        found = eval_ranks.answer(request)
    except eval_ranks.Ended as ended:
        return ended.code
    if found is None:  # a rank that is not the first
        return 0
    if options.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return 0
    for name in found["experts"]:
        home = f"{found['own'][name]:6.1%} of its tokens to its own expert by the largest logit"
        sys.stdout.write(f"{name:16} loss {found['loss'][name]:.4f}   {home}\n")
    sys.stdout.write(f"{options.out}: spread {options.spread:g}\n")
    return 0
