"""Bounds of a pickle, looked at before it is loaded.

CPython's unpickler believes the numbers in a pickle: a place in its memo (``LONG_BINPUT``) makes it
allocate sixteen bytes for every place before it, so that nine bytes take gigabytes, and the length
of a byte array is allocated before it is read. Opcodes: Lib/pickletools.py.
"""

from __future__ import annotations

import re

_NO_ARGUMENT = rb"[(012NQRabe\]}dlost)u\x81\x85-\x89\x8f-\x94\x97\x98]"
_FIXED = rb"[Khq\x80\x82].|[M\x83]..|[Jj\x84]....|r...\x00|[G\x95].{8}"
_BULK = re.compile(rb"(?>" + _NO_ARGUMENT + rb"|" + _FIXED + rb")++", re.DOTALL)
"""A run of opcodes whose arguments have one length. Memo places below 2^24 need no closer look."""
_COUNTED = {
    **dict.fromkeys(b"UC\x8c\x8a", 1),
    **dict.fromkeys(b"TXB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96", 8),
}
"""Opcodes followed by so many bytes of a length, and as many bytes as that says."""
_LINES = {**dict.fromkeys(b"FILSVgpP", 1), **dict.fromkeys(b"ci", 2)}
"""Opcodes followed by lines."""
_STOP, _LONG_BINPUT, _PUT = b"."[0], b"r"[0], b"p"[0]


def check_bounds(data: bytes) -> None:
    """Walk over the opcodes of a pickle.

    Raises:
        ValueError: a length or a place in the memo is larger than a pickle of this size can have,
            there is an opcode that does not exist, or no end.
    """
    at, size = 0, len(data)
    while at < size:
        if run := _BULK.match(data, at):
            at = run.end()
            continue
        opcode = data[at]
        if opcode == _STOP:
            return
        if width := _COUNTED.get(opcode):
            length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
            at += 1 + width + length
        elif lines := _LINES.get(opcode):
            at = _after_lines(data, at, lines)
        elif opcode == _LONG_BINPUT:
            _check_place(int.from_bytes(data[at + 1 : at + 5], "little"), size)
            at += 5
        else:
            raise ValueError(f"byte {at} is no opcode: {opcode:#04x}")
    raise ValueError(f"{size} bytes without an end")


def _after_lines(data: bytes, at: int, lines: int) -> int:
    opcode, start = data[at], at + 1
    for _ in range(lines):
        at = data.find(b"\n", at + 1)
        if at < 0:
            raise ValueError("a line without an end")
    if opcode == _PUT:
        digits = data[start:at]
        _check_place(int(digits) if len(digits) < 20 else len(data), len(data))
    return at + 1


def _check_place(place: int, size: int) -> None:
    if place >= size:
        raise ValueError(f"place {place} of the memo, in a pickle of {size} bytes")
