"""``--memory`` is a promise: resident memory, mapped pages included, of the process tree."""

from __future__ import annotations

import contextlib
import json
import sys
import time

import psutil
import pytest
from safetensors import safe_open

from megatron_btx.families.hf import hf_tensors
from megatron_btx.families.llama import LLAMA
from megatron_btx.recipe import memory
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model
from tests.mix.commands import RUN

LARGE = Architecture(
    model=Model(
        num_layers=1,
        hidden_size=1024,
        ffn_hidden_size=4096,
        num_attention_heads=8,
        untie_embeddings_and_output_weights=False,
    ),
    vocab_size=300_000,
)
"""An embedding of 586 MiB in bf16, more than any cap here."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two models of zeros: files with a hole, which take no space."""
    root = tmp_path_factory.mktemp("large")
    for label in ("a", "b"):
        directory = root / label
        directory.mkdir()
        config = LLAMA.write_config(LARGE)
        (directory / "config.json").write_text(json.dumps(config))
        header, end = {}, 0
        for name, shape in hf_tensors(LARGE).items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
        raw = json.dumps(header).encode()
        with (directory / "model.safetensors").open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    return root


@pytest.mark.parametrize(
    ("cap", "method"),
    [
        (450, ["average"]),
        (500, ["split", "--num-chunks", "4"]),
        (550, ["btx", "--format", "megatron"]),
    ],
)
def test_resident_memory_stays_below_the_cap(sources, tmp_path, cap, method):
    if memory.runtime() > memory.RUNTIME["cpu"]:
        cap += 300  # to import a torch that is built for CUDA takes that much more
    out = tmp_path / "out"
    words = [sys.executable, "-c", RUN, "mix", "--out", out]
    words += ["--sources", sources / "a", sources / "b", "--memory", f"{cap}MiB"]
    own = [*map(str, words), "--method", *method]
    process, peak = psutil.Popen(own), 0
    # Until the result is there. As Python ends, the libraries of a torch that is built for CUDA map
    # as much of themselves as is in the page cache: 100 MiB were seen.
    while process.poll() is None and not out.exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            # Imports start commands: a child that is not yet another program shares all its pages.
            others = [one for one in process.children(recursive=True) if one.cmdline() != own]
            peak = max(peak, sum(one.memory_info().rss for one in [process, *others]))
        time.sleep(0.005)
    assert process.wait() == 0
    assert peak < cap << 20
    if method != ["btx", "--format", "megatron"]:
        with safe_open(out / "model.safetensors", "pt") as file:
            assert file.get_slice("model.embed_tokens.weight").get_shape() == [300_000, 1024]
    sys.stdout.write(f"{method[0]}: {peak >> 20} of {cap} MiB\n")
