"""A Hugging Face directory as a Megatron `torch_dist` directory, for any TP x PP x EP.

    python tools/convert/hf_to_megatron.py HF_DIR               prints a recipe's `model:` block
    python tools/convert/hf_to_megatron.py HF_DIR OUT [--dtype bf16] [--memory 2GiB]

Llama 2 and 3, Mistral, Qwen2, Qwen3, Mixtral, Qwen2-MoE and Qwen3-MoE; docs/convert.md says what is
checked of each. A recipe takes the result as `seed: {from: OUT}`, and HF_DIR itself just as well.
Started again after an interruption, it goes on from the finished files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from one_model import Arguments, convert, parser, reported

from megatron_btx.recipe.reference import model_block


def main() -> int:
    """Run it; the exit code."""
    options = parser(__doc__, "HF_DIR", "a directory with config.json and safetensors")
    options.add_argument("out", metavar="OUT", nargs="?", help="the new directory")
    given = options.parse_args(namespace=Arguments())
    return reported(lambda: _run(given))


def _run(given: Arguments) -> None:
    from megatron_btx.families.hf import read_config
    from megatron_btx.families.tokenizer_files import describe_tokenizer

    family, architecture, _ = read_config(Path(given.source))
    if given.out:
        convert(given, "megatron")
    sys.stdout.write(f"# {family.model_type}, vocabulary {architecture.vocab_size:,}\n")
    if architecture.experts:
        sys.stdout.write("# a mixture of experts: recipes begin with dense models\n")
    if describe_tokenizer(Path(given.source)) is not None:
        sys.stdout.write("# its tokenizer comes with `seed: {from: ...}`: leave `tokenizer:` out\n")
    sys.stdout.write(model_block(architecture.model))


if __name__ == "__main__":
    sys.exit(main())
