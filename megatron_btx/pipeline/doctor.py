"""What this machine has, and which features that gives: ``btx doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform as python_platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_btx import cpu_info
from megatron_btx.errors import UserError
from megatron_btx.pipeline.local import run_stages

DISK_BYTES = 64 << 20
"""Written and read to tell a disk's speed."""

_PACKAGES = (
    *("torch", "megatron-core", "numpy", "sentencepiece", "safetensors", "transformers"),
    *("tokenizers", "transformer-engine", "lm-eval", "pyarrow", "resvg-py", "wandb"),
)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature, and whether this machine has what it needs."""

    name: str
    works: bool
    why: str
    """What it rests on, or what is missing and how to get it."""
    needed: bool = False
    """Without it nothing is trained."""


def examine(directory: Path) -> dict[str, Any]:
    """Facts and features.

    Args:
        directory: on the disk that is measured; it is left as it was.

    Raises:
        UserError: nothing can be written there.
    """
    facts: dict[str, Any] = {
        "python": {"version": python_platform.python_version(), "executable": sys.executable},
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cores": run_stages.cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_torch(),
        "slurm": _slurm(),
        "wandb_key": _has_key(),
        "disk": _disk(directory),
    }
    return {"facts": facts, "features": list(_features(facts))}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> dict[str, Any]:
    """What torch sees, and what a package must import for to count (engine/platform.py)."""
    try:
        import torch

        from megatron_btx.engine.platform import detect

        machine = detect()
    except (ImportError, OSError) as error:
        return {"torch_error": str(error), "gpus": [], "cuda": None, "kernels": None}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cuda": torch.version.cuda,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "kernels": {
            "transformer_engine": machine.transformer_engine,
            "apex": machine.apex,
            "layers": machine.layers,
            "optimizer": machine.optimizer,
        },
    }


def _slurm() -> str | None:
    if shutil.which("sbatch") is None:
        return None
    command = ["sbatch", "--version"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _has_key() -> bool:
    try:
        from megatron_btx.train import tracking
    except ImportError:
        return False
    return importlib.util.find_spec("wandb") is not None and tracking.has_key()


def _disk(directory: Path) -> dict[str, Any]:
    """Free bytes, and bytes a second: written to the disk's end, and read (from the cache, where
    there is room for it)."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".btx-doctor.") as file:
            start = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            wrote = time.perf_counter()
            file.seek(0)
            while file.read(1 << 20):
                pass
            read = time.perf_counter()
    except OSError as error:
        what = f"cannot be written to ({error.strerror})"
        raise UserError(str(directory), what, "give another --dir") from error
    return {
        "directory": str(directory.absolute()),
        "free_bytes": shutil.disk_usage(directory).free,
        "write_bytes_per_second": round(DISK_BYTES / (wrote - start)),
        "read_bytes_per_second": round(DISK_BYTES / (read - wrote)),
    }


def _features(facts: dict[str, Any]) -> Iterator[Feature]:
    packages, gpus, kernels = facts["packages"], facts["gpus"], facts["kernels"]
    yield _megatron(packages, facts.get("torch_error"))
    many = f"{len(gpus)} x {gpus[0]['name']}" if gpus else ""
    lacking = "torch sees none" if facts["cuda"] else "torch is built without CUDA"
    yield Feature(name="GPUs", works=bool(gpus), why=many or f"{lacking}; CPUs with gloo are used")
    if not gpus and python_platform.machine() == "x86_64":
        fast = cpu_info.has_avx512()
        slow = "no AVX-512: fp32 is about 30 times faster; set `training.precision: fp32`"
        yield Feature(name="fast bf16 on CPUs", works=fast, why="AVX-512" if fast else slow)
    engine = bool(kernels and kernels["layers"] == "transformer_engine")
    why = packages.get("transformer-engine", "") if engine else "pip install 'megatron-btx[te]'"
    own = why if gpus else "is for GPUs; torch's kernels and ours are used"
    yield Feature(name="Transformer Engine", works=engine, why=why if engine else own)
    apex = bool(kernels and kernels["apex"])
    missing = (
        "not NVIDIA's, or not built; torch's Adam is used where there is no Transformer Engine"
    )
    yield Feature(name="Apex", works=apex, why="NVIDIA's Adam" if apex else missing)
    for name, package, extra in (
        ("export checked against transformers", "transformers", "hf"),
        ("Hugging Face tokenizers", "tokenizers", "hf"),
        ("tasks (btx evaluate --tasks)", "lm-eval", "eval"),
        ("Parquet, Arrow, Zstandard", "pyarrow", "data"),
        ("figures as PNG", "resvg-py", "figures"),
    ):
        there = packages.get(package)
        fix = f"pip install 'megatron-btx[{extra}]'"
        yield Feature(
            name=name, works=there is not None, why=f"{package} {there}" if there else fix
        )
    slurm = facts["slurm"]
    yield Feature(
        name="Slurm (btx submit)", works=bool(slurm), why=slurm or "no sbatch on the PATH"
    )
    why = "a key was found" if facts["wandb_key"] else "no key: run `wandb login`; logs are offline"
    yield Feature(name="W&B online", works=facts["wandb_key"], why=why)


def _megatron(packages: dict[str, str], broken: str | None) -> Feature:
    wanted = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"
    there = packages.get("megatron-core")
    right = there is not None and there.split(".")[:2] == wanted.split(".")[:2]
    if broken is not None:
        why = f"torch does not import: {broken}"
    elif right:
        why = f"megatron-core {there}, torch {packages.get('torch', 'of unknown version')}"
    else:
        found = f"megatron-core {there}" if there else "no megatron-core"
        why = f"{found}; this Python has megatron-core=={wanted}"
    return Feature(name="training", works=right and broken is None, why=why, needed=True)
