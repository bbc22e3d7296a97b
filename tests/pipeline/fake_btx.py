"""``btx`` whose ranks run ``fake_worker``: the whole command line, no training."""

from __future__ import annotations

import sys

from megatron_btx.cli.main import main
from megatron_btx.pipeline.local import run_stages
from megatron_btx.pipeline.local.launch import Processes

if __name__ == "__main__":
    fake = (sys.executable, "-m", "tests.pipeline.fake_worker")
    run_stages.launcher_here = lambda gpus: Processes(fake)
    sys.exit(main())
