"""``btx`` whose ranks run ``fake_worker``: the whole command line, no training."""

from __future__ import annotations

import sys

from megatron_btx.cli.main import main
from megatron_btx.pipeline.local import run_stages

if __name__ == "__main__":
    run_stages.WORKER = (sys.executable, "-m", "tests.pipeline.fake_worker")
    sys.exit(main())
