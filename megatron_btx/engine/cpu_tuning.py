"""Two defaults that slow a rank on a CPU down, and what is set instead.

Neither changes what is computed: fp32 stays fp32, memory stays memory. Figures: docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_btx import cpu_info

# mallopt(3)
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_TOP_PAD = 64 << 20
FEW = 8
"""Rows up to which MKL is as fast: 285 microseconds either way for 8 by 512 by 2048."""
_POOLED = 4_500_000
"""Bytes. Larger blocks are not kept: those of collectives and of an MoE come in so many sizes that
keeping them takes a third more memory. With a megabyte here, a model of hidden 512 is a third
slower."""


def install() -> None:
    """Make both choices, for the rest of the process. Where they do not apply, nothing is done."""
    keep_memory()
    multiply_with_onednn()


def keep_memory() -> bool:
    """Let glibc keep what is freed, up to a few megabytes, for the next step will ask for it again.

    By default a tensor above some hundred kilobytes comes from ``mmap`` and goes back with
    ``munmap``, or the top of the heap does, so that each step has the kernel clear its pages anew.

    Returns:
        Whether it does; not with another C library, nor where the user's own ``MALLOC_...`` is set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = {_M_MMAP_THRESHOLD: _POOLED, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: _TOP_PAD}
    return all(mallopt(option, value) for option, value in options.items())


def multiply_with_onednn() -> bool:
    """Hand products of fp32 to oneDNN where MKL does not use what the processor has.

    MKL keeps to AVX2 on a processor that is not Intel's: half the speed where there is AVX-512.
    torch carries oneDNN too, but hands it a product of fp32 only where that may be rounded to bf16
    on the way (``torch.set_float32_matmul_precision("medium")``). oneDNN rounds with Intel's AMX
    alone; elsewhere the permission goes unused. That is tested at run time.

    Returns:
        Whether oneDNN multiplies; not where the precision is set already.
    """
    if (
        torch.get_float32_matmul_precision() != "highest"
        or not torch.backends.mkldnn.is_available()
        or not cpu_info.has_avx512_without_mkl()
    ):
        return False
    torch.set_float32_matmul_precision("medium")
    if rounds_fp32():
        torch.set_float32_matmul_precision("highest")
        return False
    return True


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of that dtype on the CPU: bf16 always, fp32 by choice."""
    return dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"


@contextmanager
def for_few_rows(rows: int, device: torch.device) -> Iterator[None]:
    """Inside, products of a few rows are MKL's again: a call of oneDNN's takes 13 microseconds
    longer, and there the time is that of reading the matrix."""
    before = torch.get_float32_matmul_precision()
    back = device.type == "cpu" and rows <= FEW and before == "medium"
    if back:
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if back:
            torch.set_float32_matmul_precision(before)


def rounds_fp32() -> bool:
    """Whether a product of fp32 matrices loses bits now: each number here times one, and nothing
    else, so that only rounding a factor can change it."""
    numbers = torch.linspace(1, 2, 64 * 64).view(64, 64)
    one = torch.eye(64)
    stacked = torch.bmm(numbers.expand(4, 64, 64), one.expand(4, 64, 64))
    return not (torch.equal(numbers @ one, numbers) and bool((stacked == numbers).all()))
