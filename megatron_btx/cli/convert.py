"""``btx convert``: Hugging Face to Megatron and back, and arguments for Megatron-LM.

Both converters are the mix of one model with nothing. Imports no torch until one runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal

from megatron_btx.cli.common import command
from megatron_btx.errors import UserError
from megatron_btx.mix.request import MixRequest
from megatron_btx.provenance import code_revision

_EPILOG = """examples:
  btx convert hf-to-megatron HF_DIR                 a recipe's `model:` block
  btx convert hf-to-megatron HF_DIR OUT             a torch_dist directory, for any TP x PP x EP
  btx convert megatron-to-hf STEP_DIR OUT           a whole Hugging Face directory
  btx convert megatron-lm-args STEP_DIR             arguments for NVIDIA's Megatron-LM"""

_TO_MEGATRON = """examples:
  btx convert hf-to-megatron HF_DIR                 prints a recipe's `model:` block
  btx convert hf-to-megatron HF_DIR OUT --dtype bf16 --memory 2GiB

docs/convert.md lists the families, and what is checked of each. A recipe takes the result as
`seed: {from: OUT}`, and HF_DIR itself just as well.
After an interruption, the same command continues from the finished files."""

_TO_HF = """examples:
  btx convert megatron-to-hf STEP_DIR OUT
  btx convert megatron-to-hf runs/demo/finetune OUT --dtype bf16 --fused

A model goes out as the family it came from, or the first that computes it: docs/convert.md. What
none of them computes is refused, with the reason.
After an interruption, the same command continues from the finished files."""

_ARGUMENTS = """examples:
  btx convert megatron-lm-args STEP_DIR
  btx convert megatron-lm-args STEP_DIR --tensor-model-parallel-size 2

STEP_DIR is a Megatron step directory or a Hugging Face one. What decides the model is printed and
nothing else: batches, schedules and the layout are yours; of a directory that is no torch_dist, the
command that converts it too. Megatron-LM pads the vocabulary to a multiple that grows with tensor
parallelism, and its softmax runs over the padding: hence the option, and the smallest padding that
tensor parallelism allows. Any mismatch of names is an error on its side, with its local layers as
with Transformer Engine's; docs/megatron.md."""


def add_parser(commands: Any) -> None:
    """Add ``convert`` to the command line."""
    parser = command(commands, "convert", "Hugging Face to Megatron and back", _EPILOG)
    kinds = parser.add_subparsers(metavar="COMMAND", required=True)
    what = "a Hugging Face directory as a Megatron one (torch_dist)"
    to_megatron = command(kinds, "hf-to-megatron", what, _TO_MEGATRON)
    to_megatron.add_argument(
        "source", metavar="HF_DIR", help="a directory with config.json and safetensors"
    )
    to_megatron.add_argument("out", metavar="OUT", nargs="?", help="the new directory")
    _add_flags(to_megatron)
    to_megatron.set_defaults(run=run_to_megatron)
    what = "convert a Megatron step directory to a complete Hugging Face directory"
    to_hf = command(kinds, "megatron-to-hf", what, _TO_HF)
    to_hf.add_argument("source", metavar="STEP_DIR", help="a checkpoint: step_XXXXXXXX")
    to_hf.add_argument("out", metavar="OUT", help="the new directory")
    to_hf.add_argument("--format", default="", metavar="FAMILY", help="the model_type to write")
    to_hf.add_argument(
        "--fused", action="store_true", help="stack the experts, under the names of transformers 5"
    )
    _add_flags(to_hf)
    to_hf.set_defaults(run=run_to_hf)
    what = "arguments with which NVIDIA's Megatron-LM trains a checkpoint on"
    arguments = command(kinds, "megatron-lm-args", what, _ARGUMENTS)
    arguments.add_argument("source", metavar="STEP_DIR", help="the checkpoint")
    arguments.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="TP")
    arguments.set_defaults(run=run_arguments)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("bf16", "fp32", "fp16"), help="dtype of the result")
    parser.add_argument("--memory", default="", help="peak resident memory, such as 2GiB")
    parser.add_argument(
        "--shard", default="1GiB", help="size of an output file; an interruption loses at most this"
    )


def run_to_megatron(options: argparse.Namespace) -> int:
    """``btx convert hf-to-megatron``: the block of a recipe; with ``OUT`` the directory too."""
    from megatron_btx.families.hf import read_config
    from megatron_btx.families.tokenizer_files import describe_tokenizer
    from megatron_btx.recipe.key_reference import model_block

    family, architecture, _ = read_config(Path(options.source))
    if options.out:
        _convert(options, "megatron")
    sys.stdout.write(f"# {family.model_type}, vocabulary {architecture.vocab_size:,}\n")
    if architecture.experts:
        sys.stdout.write("# a mixture of experts: recipes begin with dense models\n")
    if describe_tokenizer(Path(options.source)) is not None:
        sys.stdout.write("# its tokenizer comes with `seed: {from: ...}`: leave `tokenizer:` out\n")
    sys.stdout.write(model_block(architecture.model))
    return 0


def run_to_hf(options: argparse.Namespace) -> int:
    """``btx convert megatron-to-hf``.

    Raises:
        UserError: the source is a Hugging Face directory.
    """
    from megatron_btx.weights.find_checkpoint import find_checkpoint, is_hugging_face

    if is_hugging_face(find_checkpoint(options.source)):
        fix = "give a Megatron step directory; btx mix --method copy writes a model anew"
        raise UserError(options.source, "is a Hugging Face directory already", fix)
    _convert(options, "hf", family=options.format, fused=options.fused)
    return 0


def run_arguments(options: argparse.Namespace) -> int:
    """``btx convert megatron-lm-args``."""
    from megatron_btx.families.open_checkpoint import open_checkpoint
    from megatron_btx.families.write_megatron_lm_args import command_line

    checkpoint = open_checkpoint(Path(options.source), "model")
    sys.stdout.write(command_line(checkpoint, options.tensor_model_parallel_size))
    return 0


def _convert(options: argparse.Namespace, form: Literal["hf", "megatron"], **more: Any) -> None:
    """Copy the checkpoint that the command line names into ``form``."""
    revision = code_revision()  # asks git by a child: while we are small (cli/mix.py)
    from megatron_btx.mix import offline

    request = MixRequest(
        sources=(f"model={options.source}",),
        out=options.out,
        method="copy",
        format=form,
        dtype=options.dtype,
        memory=options.memory,
        shard=options.shard,
        **more,
    )
    offline.run(request, sys.stdout, revision)
