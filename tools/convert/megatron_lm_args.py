"""``btx convert megatron-lm-args`` by its old name."""

import sys

from megatron_btx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-lm-args", *sys.argv[1:]]))
