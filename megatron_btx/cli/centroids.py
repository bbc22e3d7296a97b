"""``btx centroids``: the file for ``router_init: centroids`` and ``ridge``. Imports no torch."""

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
`mix: {router_init: centroids, centroids: centroids.safetensors}`.

With `--kind ridge` the rows solve the ridge regression of a token's domain on its input, and go
with `--router-init ridge`. `--statistics FILE` keeps its sums: when an expert is added later, its
text alone is read.
  btx centroids MOE --kind ridge --statistics sums.safetensors --data ... --out ridge.safetensors"""


def add_parser(commands: Any) -> None:
    """Add ``centroids`` to the command line."""
    parser = command(
        commands,
        "centroids",
        "routers that know their experts' domains: centroids or ridge, for btx mix",
        _EPILOG,
        "Write router rows made of what every expert's domain gives to the MoE layers.",
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
        "--kind", choices=("centroids", "ridge"), default="centroids", help="the rule (centroids)"
    )
    parser.add_argument(
        "--spread",
        metavar="S",
        type=float,
        help="standard deviation over the experts of a token's logits (centroids: 1; ridge: as "
        "it is solved)",
    )
    parser.add_argument(
        "--regularization",
        metavar="L",
        type=float,
        default=1e-3,
        help="lambda of ridge, as a share of the mean diagonal of X^T X (0.001)",
    )
    parser.add_argument(
        "--statistics",
        metavar="FILE",
        type=Path,
        help="sums of ridge: read where it is there, written with the new domains added",
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
    for name in ("spread", "regularization"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name}", f"is {value}", "give a positive number")
    if options.statistics is not None and options.kind != "ridge":
        raise UserError("--statistics", "are those of ridge", "add --kind ridge, or leave it out")
    if options.out.exists():
        raise UserError(str(options.out), "exists already", "remove it, or give another name")
    check_file(options.out)
    request = eval_ranks.request_of(
        "centroids",
        subjects,
        model_flags.layout_of(options.layout),
        data=model_flags.data_of(options.data),
        setting={**model_flags.setting_of(options), "tokens": options.tokens},
        how={name: getattr(options, name) for name in ("kind", "spread", "regularization")},
        statistics=options.statistics and str(options.statistics.absolute()),
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
    for name in found["loss"]:
        home = f"{found['own'][name]:6.1%} of its tokens to its own expert by the largest logit"
        sys.stdout.write(f"{name:16} loss {found['loss'][name]:.4f}   {home}\n")
    spread = "as solved" if found["spread"] is None else f"{found['spread']:g}"
    sys.stdout.write(f"{options.out}: {found['kind']}, spread {spread}\n")
    return 0
