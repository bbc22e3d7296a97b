"""A Megatron step directory as a self-contained Hugging Face directory: no reference model needed.

    python tools/convert/megatron_to_hf.py STEP_DIR OUT [--dtype bf16] [--memory 2GiB] [--fused]

A dense model goes out as the family it came from, or the first that computes it; a mixture as
Mixtral, Qwen2-MoE or Qwen3-MoE; docs/convert.md. What none of them computes is refused, with the
reason. Started again after an interruption, it goes on from the finished files.
"""

from __future__ import annotations

import sys

from one_model import Arguments, convert, parser, reported


def main() -> int:
    """Run it; the exit code."""
    options = parser(__doc__, "STEP_DIR", "a checkpoint: step_XXXXXXXX")
    options.add_argument("out", metavar="OUT", help="the new directory")
    options.add_argument("--format", default="", metavar="FAMILY", help="the model_type to write")
    options.add_argument(
        "--fused", action="store_true", help="experts stacked, as transformers 5 names them"
    )
    given = options.parse_args(namespace=Arguments())
    return reported(lambda: convert(given, "hf"))


if __name__ == "__main__":
    sys.exit(main())
