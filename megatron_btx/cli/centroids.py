"""``btx centroids``: the file for ``router_init: centroids`` and ``ridge``. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import command
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.files import check_file, json_text
from megatron_btx.pipeline import eval_ranks

_EPILOG = """examples:
  btx mix --sources code=DIR math=DIR seed=DIR --router-init zeros --out MOE
  btx centroids MOE --data code=code.jsonl math=math.jsonl seed=web.jsonl \\
    --out centroids.safetensors
  btx mix --sources code=DIR math=DIR seed=DIR --router-init centroids \\
    --centroids centroids.safetensors --out MIXTRAL

Each text is read twice, with all tokens routed to the expert of its name. A recipe accepts the file
too: `mix: {router_init: centroids, centroids: centroids.safetensors}`.

With `--kind ridge` the rows solve the ridge regression of a token's domain on its input, and go
with `--router-init ridge`. `--statistics FILE` keeps its sums: when an expert is added later, its
text alone is read.
  btx centroids MOE --kind ridge --statistics sums.safetensors --data ... --out ridge.safetensors"""


def add_parser(commands: Any) -> None:
    """Add ``centroids`` to the command line."""
    parser = command(
        commands,
        "centroids",
        "compute router rows from text, by centroids or ridge regression, for btx mix",
        _EPILOG,
        "Compute router rows from the inputs of the MoE layers on text of every expert's domain.",
    )
    parser.add_argument("checkpoint", metavar="MOE", help="the mixed model, of either format")
    model_flags.add_text_flags(
        parser,
        "EXPERT=FILE[,FILE]",
        "JSONL files and directories with text of each expert's domain",
        tokens=65536,
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the new file")
    parser.add_argument(
        "--kind",
        choices=("centroids", "ridge"),
        default="centroids",
        help="how rows are computed (centroids)",
    )
    parser.add_argument(
        "--spread",
        metavar="S",
        type=float,
        help="standard deviation over the experts of a token's logits (centroids: 1; ridge: not "
        "rescaled)",
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
        help="file of the sums for ridge: read if it exists, and extended by new domains",
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
        raise UserError("--statistics", "is for ridge only", "add --kind ridge, or leave it out")
    if options.statistics is not None and options.out.resolve() == options.statistics.resolve():
        what = "is the file of --out too, and holds other numbers"
        raise UserError(f"--statistics {options.statistics}", what, "give two names")
    if options.out.exists():
        raise UserError(str(options.out), "exists already", "remove it, or give another name")
    check_file(options.out)
    out, statistics = (path and str(path.absolute()) for path in (options.out, options.statistics))
    request = eval_ranks.request_of(
        "centroids",
        subjects,
        model_flags.layout_of(options.layout),
        data=model_flags.data_of(options.data),
        setting={**model_flags.setting_of(options), "tokens": options.tokens},
        how={name: getattr(options, name) for name in ("kind", "spread", "regularization")},
        statistics=statistics,
        out=out,
        writes=[path for path in (out, statistics) if path],
    )
    found = eval_ranks.answer(request)
    if found is None:  # a rank that is not the first
        return 0
    if options.json:
        sys.stdout.write(json_text(found, indent=1) + "\n")
        return 0
    for name in found["loss"]:
        home = f"{found['own'][name]:6.1%} of its tokens to its own expert by the largest logit"
        sys.stdout.write(f"{name:16} loss {found['loss'][name]:.4f}   {home}\n")
    spread = "as solved" if found["spread"] is None else f"{found['spread']:g}"
    sys.stdout.write(f"{options.out}: {found['kind']}, spread {spread}\n")
    return 0
