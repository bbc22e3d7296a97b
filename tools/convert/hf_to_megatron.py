"""A Hugging Face directory (Llama, Mixtral) as a Megatron ``torch_dist`` directory.

    python tools/convert/hf_to_megatron.py HF_DIR OUT [--dtype bf16] [--memory 2GiB]

What it writes loads under any TP x PP x EP and can be named as ``seed: {from: OUT}`` in a recipe.
"""

from __future__ import annotations

import sys

from one_model import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "megatron"))
