"""A Megatron step directory of btx as a Hugging Face directory: a Llama, or a Mixtral if an MoE.

    python tools/convert/megatron_to_hf.py STEP_DIR OUT [--dtype bf16] [--memory 2GiB]

Both directions are the mix of one model with nothing: ``btx mix --method copy``.
"""

from __future__ import annotations

import sys

from one_model import main

if __name__ == "__main__":
    sys.exit(main(__doc__, "hf"))
