"""``btx convert megatron-to-hf`` by its old name."""

import sys

from megatron_btx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
