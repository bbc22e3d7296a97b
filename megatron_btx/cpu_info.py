"""What this machine's processor is. Imports no torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path


def has_avx512() -> bool:
    """Whether it has AVX-512; ``False`` where Linux does not say."""
    return "avx512f" in _description()


def has_avx512_without_mkl() -> bool:
    """Whether it has AVX-512 and Intel's MKL will not use it: on another maker's it keeps to AVX2.

    ``False`` where Linux does not say.
    """
    maker = re.search(r"^vendor_id\s*: (\S+)", _description(), re.MULTILINE)
    return maker is not None and maker[1] != "GenuineIntel" and has_avx512()


@functools.cache
def _description() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
