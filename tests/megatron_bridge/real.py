"""The real Megatron-Bridge 0.6.2 on both sides of us: exits 0 where all of it agrees.

    PYTHONPATH=SITE python -m tests.megatron_bridge.real [DIRECTORY]

with Python 3.12 and the environment of docs/megatron.md in SITE. For a Llama, a Llama 3 with tied
embeddings, a Qwen3 and a Qwen3-MoE, each with its tokenizer: Bridge imports it from Hugging Face,
and our reader gives the same tensors back; the directory is what made.py writes, to the byte; we
write Megatron's form, and Bridge's own export gives the same tensors back. So for a mix.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.megatron_bridge.cases import CASES, converted, make_source, mixed, same_model
from tests.megatron_bridge.made import FILE, STEP, make_bridge


def main() -> int:
    """Run it; the exit code."""
    from tests.megatron_bridge.on_a_cpu import auto_bridge

    with tempfile.TemporaryDirectory() as made:
        work = Path(sys.argv[1] if len(sys.argv) > 1 else made)
        bridge = auto_bridge()
        wrong = []
        checks = {case: partial(_check, bridge, case) for case in CASES}
        for name, check in (checks | {"mix": partial(_check_mix, bridge)}).items():
            (work / name).mkdir(parents=True)
            found = [f"{name}: {problem}" for problem in check(work / name)]
            sys.stdout.write("\n".join(found or [f"{name}: agrees"]) + "\n")
            wrong += found
        sys.stdout.write("all of it agrees\n" if not wrong else f"{len(wrong)} do not agree\n")
        return int(bool(wrong))


def _check(bridge: Any, case: str, work: Path) -> Iterator[str]:
    source = make_source(case, work / "hf")
    with _rank():
        _import(bridge, source, work / "real")
    back = converted(work / "real" / STEP, work / "back", "hf")
    yield from (f"Bridge -> ours: {one}" for one in same_model(source, back))
    make_bridge(source, work / "made")
    yield from (f"made.py: {one}" for one in _unlike(work / "real", work / "made"))
    ours = converted(source, work / "ours", "megatron")
    _export(bridge, source, ours, work / "exported")
    yield from (f"ours -> Bridge: {one}" for one in same_model(source, work / "exported"))
    # By its own configuration alone: what Bridge makes of its own directory.
    for name, step in (("own", work / "real"), ("auto", ours)):
        found = bridge.from_auto_config(str(step), str(source))
        found.export_ckpt(str(step), str(work / name), show_progress=False, strict=True)
    yield from (f"ours -> Bridge, auto: {one}" for one in same_model(work / "own", work / "auto"))


def _check_mix(bridge: Any, work: Path) -> Iterator[str]:
    """Two of its directories, and one beside a Hugging Face one, are the mix of the two Hugging
    Face models; and Bridge exports our mix."""
    sources = [make_source("qwen3", work / f"hf{at}", seed=at) for at in (1, 2)]
    for at, source in enumerate(sources):
        with _rank():
            _import(bridge, source, work / f"real{at}")
    first, second = (work / f"real{at}" / STEP for at in (0, 1))
    expected = mixed(sources, work / "expected", "hf")
    for name, given in (("two", [first, second]), ("one", [first, sources[1]])):
        found = mixed(given, work / name, "hf")
        yield from (f"mix of {name}: {problem}" for problem in same_model(expected, found))
    ours = mixed([first, second], work / "ours", "megatron")
    _export(bridge, expected, ours, work / "exported")
    yield from (f"our mix -> Bridge: {one}" for one in same_model(expected, work / "exported"))


def _export(bridge: Any, reference: Path, step: Path, out: Path) -> None:
    """``AutoBridge.export_ckpt``, which takes ``config.json`` and tokenizer of a reference."""
    found = bridge.from_hf_pretrained(str(reference))
    found.export_ckpt(str(step), str(out), show_progress=False, strict=True)


class _rank:
    """One gloo rank, for imports: export makes its own."""

    def __enter__(self) -> None:
        file = tempfile.NamedTemporaryFile(delete=False)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{file.name}", rank=0, world_size=1
        )
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")

    def __exit__(self, *_: object) -> None:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _import(bridge: Any, source: Path, out: Path) -> None:
    """``AutoBridge.import_ckpt``; of an MoE without the fusions that are Transformer Engine's, for
    which it asks when its configuration is made."""
    dtype = getattr(torch, json.loads((source / "config.json").read_text())["dtype"])
    loaded = bridge.from_hf_pretrained(str(source), torch_dtype=dtype, device_map="cpu")
    provider = loaded.to_megatron_provider()
    provider.moe_grouped_gemm = provider.moe_permute_fusion = False
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    loaded.save_megatron_model(model, out, hf_tokenizer_path=source, low_memory_save=True)


def _unlike(real: Path, made: Path) -> Iterator[str]:
    """In what a directory that Bridge wrote differs from one of made.py."""
    files = [_files(one) for one in (real, made)]
    if files[0] != files[1]:
        yield f"other files: {sorted(files[0] ^ files[1])}"
    metadata = [pickle.loads((one / STEP / ".metadata").read_bytes()) for one in (real, made)]
    for name in ("state_dict_metadata", "storage_data"):
        theirs, ours = (getattr(one, name) for one in metadata)
        if list(theirs.items()) != list(ours.items()):
            yield f"other {name}"
    for name in (FILE, "metadata.json", "train_state.pt"):
        if (real / STEP / name).read_bytes() != (made / STEP / name).read_bytes():
            yield f"other bytes of {name}"
    theirs, ours = (
        yaml.safe_load((one / STEP / "run_config.yaml").read_text()) for one in (real, made)
    )
    ours["checkpoint"]["save"] = str(real)
    for block in theirs.keys() | ours.keys():
        if theirs.get(block) != ours.get(block):
            yield f"run_config.yaml: {block}: {_differing(theirs.get(block), ours.get(block))}"


def _differing(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one, other
    keys = [key for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
    return {key: (one.get(key), other.get(key)) for key in sorted(keys)}


def _files(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


if __name__ == "__main__":
    sys.exit(main())
