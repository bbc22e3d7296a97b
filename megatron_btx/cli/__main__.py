"""``python -m megatron_btx.cli``, which is ``btx``."""

import sys

from megatron_btx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
