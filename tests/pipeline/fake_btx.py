"""``btx`` whose ranks run ``fake_worker``: the whole command line, no training."""

from __future__ import annotations

import sys

from megatron_btx import cli
from megatron_btx.pipeline import local

if __name__ == "__main__":
    local.WORKER = (sys.executable, "-m", "tests.pipeline.fake_worker")
    sys.exit(cli.main())
