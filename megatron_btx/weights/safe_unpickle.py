"""Reading the pickles of a Megatron checkpoint without running what they say.

``.metadata``, ``common.pt`` and the header of every stored tensor are pickles, and a pickle can
name any function to call. Here each name must be on a list, and most of the list stands for an
inert :class:`Record`, so nothing of torch.distributed or Megatron is imported, let alone run.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_btx.errors import UserError


class Record:
    """What stands in for any listed class: its call arguments and its state, never behaviour."""

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
    ("torch.serialization", "_get_layout"): Record,
    ("collections", "OrderedDict"): dict,
    **{
        (f"{_DCP}.metadata", name): Record
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
    (f"{_DCP}.filesystem", "_StorageInfo"): Record,
    (f"{_DCP}.filesystem", "_StoragePrefix"): Record,
    **{
        (f"{_DCP}.planner", name): Record
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    },
    **{
        ("megatron.core.dist_checkpointing.strategies.torch", name): Record
        for name in ("MCoreMetadata", "MCoreSavePlan")
    },
    **{
        (module, name): Record
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
    ("torch._utils", "_rebuild_tensor_v2"): Record,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
}
"""What the header of a stored tensor may name."""


COMMON_NAMES: Mapping[tuple[str, str], Any] = {
    **METADATA_NAMES,
    **TENSOR_NAMES,
    ("argparse", "Namespace"): Record,
    **{("signal", name): Record for name in ("Signals", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")},
    **{
        ("megatron.core.transformer.enums", name): Record
        for name in (
            *("AttnBackend", "AttnMaskType", "AttnType", "LayerType"),
            *("CudaGraphScope", "CudaGraphModule", "InferenceCudaGraphScope"),
        )
    },
    **{
        ("megatron.core.rerun_state_machine", name): Record
        for name in ("RerunDiagnostic", "RerunMode", "RerunState")
    },
    **{("megatron.core.enums", name): Record for name in ("Fp4Recipe", "Fp8Recipe", "ModelType")},
}
"""What ``common.pt``, or the object that 0.19 stores in its place, may name: Megatron-LM keeps its
arguments there."""


class _ListedUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, where: str, names: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._where, self._names = where, names

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise UserError(
                self._where,
                f"names {module}.{name}, which no checkpoint needs: refused",
                "do not use this directory unless you know who wrote it",
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load(file: BinaryIO, where: Path | str, names: Mapping[tuple[str, str], Any]) -> Any:
    """Unpickle by a list of allowed names.

    Raises:
        UserError: a name that is not on the list, or bytes that are no pickle.
    """
    try:
        return _ListedUnpickler(file, str(where), names).load()
    except UserError:
        raise
    except Exception as error:  # an unpickler raises whatever its input makes it raise
        raise UserError(
            str(where), f"truncated or corrupt: {error}", "copy the checkpoint again"
        ) from error


def loads(data: bytes, where: Path | str, names: Mapping[tuple[str, str], Any]) -> Any:
    """:func:`load` from bytes."""
    return load(io.BytesIO(data), where, names)
