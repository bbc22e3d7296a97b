"""``python -m megatron_btx.cli``, which is ``btx``."""

import signal
import sys


def run() -> int:
    """``main()``; Ctrl-C before it looks after that itself ends the process without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from megatron_btx.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
