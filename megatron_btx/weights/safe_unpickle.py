"""Reads the pickles of a Megatron checkpoint without executing anything they name.

``.metadata``, ``common.pt`` and the header of every stored tensor are pickles, and a pickle can
name any function to call. Here each name must be on a list, and most names on it are replaced by an
inert :class:`StubObject`, so nothing of torch.distributed or Megatron is imported, let alone run.
"""

from __future__ import annotations

import io
import itertools
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from megatron_btx.errors import UserError, shown
from megatron_btx.files import read_bytes

LIMIT = 256 << 20
"""Bytes of one pickle. The metadata of a model with its optimizer, of 100,000 chunks, has 40 MB."""

_AGAIN = "copy the checkpoint again, or take an earlier step"


class StubObject:
    """Stands for an object of a listed class: its call arguments and its state, no behaviour."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __hash__(self) -> int:
        return id(self)


_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_DCP = "torch.distributed.checkpoint"
METADATA_NAMES: Mapping[tuple[str, str], Any] = {
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): StubObject,
    ("collections", "OrderedDict"): dict,
    **{
        (f"{_DCP}.metadata", name): StubObject
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): StubObject,
    (f"{_DCP}.filesystem", "_StoragePrefix"): StubObject,
    **{
        (f"{_DCP}.planner", name): StubObject
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    },
    **{
        ("megatron.core.dist_checkpointing.strategies.torch", name): StubObject
        for name in ("MCoreMetadata", "MCoreSavePlan")
    },
    **{
        (module, name): StubObject
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath")
    },
}
"""What ``.metadata`` may name."""

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
"""Names of torch's storage classes."""

TENSOR_NAMES: Mapping[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): StubObject,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
}
"""What the header of a stored tensor may name."""


COMMON_NAMES: Mapping[tuple[str, str], Any] = {
    **METADATA_NAMES,
    **TENSOR_NAMES,
    ("argparse", "Namespace"): StubObject,
    **{
        ("signal", name): StubObject
        for name in ("Signals", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
    },
    **{
        ("megatron.core.transformer.enums", name): StubObject
        for name in (
            *("AttnBackend", "AttnMaskType", "AttnType", "LayerType"),
            *("CudaGraphScope", "CudaGraphModule", "InferenceCudaGraphScope"),
        )
    },
    **{
        ("megatron.core.rerun_state_machine", name): StubObject
        for name in ("RerunDiagnostic", "RerunMode", "RerunState")
    },
    **{
        ("megatron.core.enums", name): StubObject
        for name in ("Fp4Recipe", "Fp8Recipe", "ModelType")
    },
}
"""What ``common.pt``, or the object that 0.19 stores in its place, may name: Megatron-LM keeps its
arguments there."""


_DEPTH, _VALUES = 64, 100_000
"""Levels of lists and mappings in one argument of a trainer, and values in it, those counted as
often as they are met that stand in several places."""


def arguments(content: Any, where: Path | str) -> dict[str, Any] | None:
    """The trainer's arguments in what a checkpoint says beside its tensors; ``None``: there are
    none.

    Raises:
        UserError: what is there are no arguments, or one is nested or larger beyond all sense.
    """
    args = content.get("args") if isinstance(content, dict) else None
    if args is None:
        return None
    if not isinstance(args, StubObject):
        what = f"its args are of type {type(args).__name__}, no arguments of Megatron-LM"
        raise UserError(str(where), what, "copy the checkpoint again")
    found = {str(name): value for name, value in vars(args).items()}
    for name, value in found.items():
        if not _plain(value):
            what = f"{shown(name)} of its args is nested more than {_DEPTH} deep, or has more than "
            raise UserError(str(where), f"{what}{_VALUES:,} values", "copy the checkpoint again")
    return found


def _plain(value: Any) -> bool:
    """Whether a value, which may hold itself, can be walked through."""
    level, count = [value], 0
    for _ in range(_DEPTH):
        inner = (each.values() if isinstance(each, dict) else each for each in level
                 if isinstance(each, dict | list | tuple | set | frozenset))  # fmt: skip
        level = list(itertools.islice(itertools.chain.from_iterable(inner), _VALUES + 1 - count))
        count += len(level)
        if not level or count > _VALUES:
            return not level
    return False


class _Dict(dict[Any, Any]):
    """A dictionary with attributes: of a module's state, ``_metadata``."""


MP_RANK_NAMES: Mapping[tuple[str, str], Any] = {
    **COMMON_NAMES,
    ("collections", "OrderedDict"): _Dict,
    ("_codecs", "encode"): StubObject,
    ("megatron.model.enums", "ModelType"): StubObject,  # of the legacy models, which are refused
    ("_io", "BytesIO"): StubObject,
    **{
        (f"numpy{core}.multiarray", name): StubObject
        for core in (".core", "._core")
        for name in ("_reconstruct", "scalar")
    },
    **{("numpy", name): StubObject for name in ("ndarray", "dtype")},
}
"""What the one pickle of a rank in the form ``--ckpt-format torch`` may name: besides, the state of
numpy's generator and of Transformer Engine's scaling, none of which is looked at."""


class _ListedUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, where: str, names: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._where, self._names = where, names

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise _unlisted(self._where, module, name) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


class Pickles:
    """What stands in for the module ``pickle`` where torch unpickles: real objects, of listed names
    only. For ``torch.load(pickle_module=)`` and ``torch.distributed.checkpoint``.

    Args:
        where: what errors name.
        names: those that may occur.
    """

    __name__ = "megatron_btx.weights.safe_unpickle"

    def __init__(self, where: Path | str, names: Iterable[tuple[str, str]]) -> None:
        listed = frozenset(names)

        class Unpickler(pickle.Unpickler):
            def __init__(self, file: IO[bytes], **options: Any) -> None:
                data = file.read(LIMIT + 1)
                _check(data, where)
                super().__init__(io.BytesIO(data), **options)

            def find_class(self, module: str, name: str) -> Any:
                if (module, name) not in listed:
                    raise _unlisted(where, module, name)
                return super().find_class(module, name)

        self.Unpickler = Unpickler

    def load(self, file: IO[bytes], **options: Any) -> Any:
        """Unpickle a file.

        Raises:
            UserError: a name that is not on the list, or bytes that are no pickle.
        """
        return self.Unpickler(file, **options).load()


def load(path: Path, names: Mapping[tuple[str, str], Any]) -> Any:
    """Unpickle a file by a list of allowed names.

    Raises:
        UserError: a name that is not on the list, or bytes that are no pickle.
    """
    return loads(read_bytes(path, LIMIT), path, names)


def loads(data: bytes, where: Path | str, names: Mapping[tuple[str, str], Any]) -> Any:
    """:func:`load` from bytes."""
    _check(data, where)
    try:
        return _ListedUnpickler(io.BytesIO(data), str(where), names).load()
    except UserError:
        raise
    except Exception as error:  # an unpickler raises whatever its input makes it raise
        raise _damaged(where, error) from error


def _check(data: bytes, where: Path | str) -> None:
    if len(data) > LIMIT:
        what = f"a pickle of more than {LIMIT:,} bytes, which no checkpoint has"
        raise UserError(str(where), what, _AGAIN)
    try:
        _check_bounds(data)
    except ValueError as error:
        raise _damaged(where, error) from error


def _damaged(where: Path | str, error: Exception) -> UserError:
    return UserError(str(where), f"truncated or corrupt: {error}", _AGAIN)


def _unlisted(where: Path | str, module: str, name: str) -> UserError:
    return UserError(
        str(where),
        f"names {shown(module)}.{shown(name)}, which no checkpoint needs: refused",
        "do not use this directory unless you know who wrote it",
    )


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


def _check_bounds(data: bytes) -> None:
    """Check the lengths and memo indices of a pickle before it is loaded.

    CPython's unpickler trusts the numbers in a pickle: an index in its memo (``LONG_BINPUT``)
    allocates sixteen bytes for every index below it, so that nine bytes take gigabytes, and a byte
    array is allocated before it is read. Opcodes: Lib/pickletools.py.

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
