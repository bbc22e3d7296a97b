"""A Megatron step directory as a self-contained Hugging Face directory: no reference model needed.

    python tools/convert/megatron_to_hf.py STEP_DIR OUT [--dtype bf16] [--memory 2GiB] [--fused]

A dense model goes out as the family it came from, or the first that computes it; a mixture as
Mixtral, Qwen2-MoE or Qwen3-MoE; docs/convert.md. What none of them computes is refused, with the
reason. Started again after an interruption, it goes on from the finished files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from one_model import Arguments, convert, parser, reported

if TYPE_CHECKING:
    from megatron_btx.mix.offline import Besides


def main() -> int:
    """Run it; the exit code."""
    options = parser(__doc__, "STEP_DIR", "a checkpoint: step_XXXXXXXX")
    options.add_argument("out", metavar="OUT", help="the new directory")
    options.add_argument("--format", default="", metavar="FAMILY", help="the model_type to write")
    options.add_argument(
        "--fused", action="store_true", help="experts stacked, as transformers 5 names them"
    )
    given = options.parse_args(namespace=Arguments())
    return reported(lambda: convert(given, "hf", _besides(Path(given.source))))


def _besides(checkpoint: Path) -> Besides:
    """The tokenizer in the form that `transformers` reads, and its tokens; of a checkpoint that
    came from Hugging Face both have been kept as they were."""
    from megatron_btx.data.tokenizer import INFO, load_tokenizer
    from megatron_btx.files import find_json
    from megatron_btx.mix.offline import Besides
    from megatron_btx.weights.manifest import MANIFEST

    directory = checkpoint / "tokenizer"
    kept = (find_json(checkpoint / MANIFEST) or {}).get("huggingface")
    if kept or not (directory / INFO).is_file():
        return Besides()
    tokenizer = load_tokenizer(directory)
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_huggingface(folder)
        files = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    return Besides({name: each for name, each in tokens.items() if each is not None}, files)


if __name__ == "__main__":
    sys.exit(main())
