"""``btx generate``: continue prompts. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megatron_btx.cli import model_flags
from megatron_btx.cli.common import command, renamed
from megatron_btx.cli.evaluate import CHECKPOINT
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.files import json_text
from megatron_btx.pipeline import eval_ranks
from megatron_btx.recipe.messages import flag_of

_EPILOG = f"""examples:
  btx generate runs/demo/finetune --prompt "def area(radius):"
  btx generate btm:runs/demo --prompt "Q: 3 + 4 = " --max-new-tokens 8 --stop ";"
  btx generate HF_DIR --temperature 0.8 --top-p 0.95 --random-seed 3 --prompt "Once" --prompt "In"
  echo "Once upon" | btx generate HF_DIR --prompt - --json

{CHECKPOINT}"""


def add_parser(commands: Any) -> None:
    """Add ``generate`` to the command line."""
    parser = command(commands, "generate", "continue prompts with any checkpoint", _EPILOG)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model, or a BTM set")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        default=[],
        help="a prompt (may be repeated); -: standard input",
    )
    model_flags.add_model_flags(parser)
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        help="maximum number of new tokens (64, or half of the model's context)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="sampling temperature (0: greedy)",
    )
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="nucleus sampling (1)"
    )
    parser.add_argument(
        "--random-seed", metavar="N", type=int, default=0, help="random seed of sampling (0)"
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="text that ends a continuation (may be repeated)",
    )
    renamed(parser, "--until", "--stop")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """``btx generate``."""
    model_flags.check_numbers(options)
    subjects = model_spec.parse([options.checkpoint])
    if not options.prompt:
        raise UserError("--prompt", "is missing", "give the text to continue")
    for flag, good in (
        ("max_new_tokens", options.max_new_tokens is None or options.max_new_tokens >= 1),
        ("temperature", options.temperature >= 0),
        ("top_p", 0 < options.top_p <= 1),
        ("random_seed", 0 <= options.random_seed < 2**31),
        ("stop", all(options.stop)),
    ):
        if not good:
            what = f"{getattr(options, flag)} is out of range"
            raise UserError(flag_of(flag), what, "see btx generate --help")
    prompts = [model_flags.text_of("--prompt", prompt) for prompt in options.prompt]
    decoding = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "random_seed": options.random_seed,
        "until": options.stop,
    }
    asked = eval_ranks.request_of(
        "generate",
        subjects,
        model_flags.layout_of(options.layout),
        prompts=prompts,
        decoding=decoding,
        predictor=model_flags.predictor_of(options),
    )
    found = eval_ranks.answer(asked)
    if found is None:
        return 0
    for number, one in enumerate(found, 1):
        if one["cut"]:
            what = f"its first {one['cut']} tokens do not fit the model's context and are dropped"
            room = "" if options.max_new_tokens == 1 else "; fewer --max-new-tokens leave more room"
            sys.stderr.write(f"warning: prompt {number}: {what}{room}\n")
    if options.json:
        rows = [{"prompt": prompt} | one for prompt, one in zip(prompts, found, strict=True)]
        shows_all = (sys.stdout.encoding or "").lower().startswith("utf")
        sys.stdout.write(json_text(rows, indent=1, ensure_ascii=not shows_all) + "\n")
        return 0
    for number, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        sys.stdout.write(("\n" if number else "") + prompt + one["text"] + "\n")
    return 0
