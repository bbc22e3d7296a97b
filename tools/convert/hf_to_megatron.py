"""``btx convert hf-to-megatron`` by its old name."""

import sys

from megatron_btx.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
