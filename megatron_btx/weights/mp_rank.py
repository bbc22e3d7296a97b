"""Megatron-LM's older form, ``--ckpt-format torch``: one ``torch.save`` a model-parallel rank, read
by mapped slices.

``mp_rank_TT``, under pipeline parallelism ``mp_rank_TT_PPP``, under expert parallelism with one
number more, hold ``model_optim_rng.pt`` (``get_checkpoint_name`` of
``megatron.training.checkpointing``); the distributed optimizer's own files beside it are not looked
at. Tensors lie there under the names of the modules, layers and experts counted from each rank's
first; under virtual pipeline stages in one mapping for each, ``model0``, ``model1``, their layers
counted from its first.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, dtype

from megatron_btx.errors import UserError, UserErrors, capped, shown
from megatron_btx.recipe.names import EMBEDDING, HEAD
from megatron_btx.recipe.read_architecture import MOST_EXPERTS
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.box import Box, Shape, sizes, told
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.mmap_io import read_box
from megatron_btx.weights.ops import cat, rows
from megatron_btx.weights.read_torch_zip import DAMAGED, MALFORMED, Chunk, StoredArchive
from megatron_btx.weights.source import FileSource

FILE = "model_optim_rng.pt"

Rank = tuple[int, int, int]
"""Tensor-, pipeline- and expert-parallel rank."""
Place = tuple[Rank, int]
"""A rank, and which of its virtual pipeline stages."""

_AGAIN = "copy the checkpoint again, or take an earlier step"
_MOST_RANKS = 1 << 17
"""Far above all that a model was divided over: a name is made for each."""
_LEGACY = "is of Megatron-LM's legacy model format, from before Megatron-Core"
_TO_CORE = (
    "convert it with Megatron-LM's own tools/checkpoint/convert.py (--loader legacy --saver core), "
    "of a release that has them"
)
_LAYER = re.compile(r"decoder\.layers\.(\d{1,9})\.(.*)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d{1,9})\.(.*)")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d{1,9})(_[wv]|)")
_GATED = "linear_fc1.weight"
_ROWS = (EMBEDDING, HEAD, "linear_qkv.weight", "linear_qkv.bias")
"""Ends of names of what tensor parallelism divides along the first dimension."""
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
"""Along the second; everything else is whole on every rank."""


@dataclass(frozen=True)
class _Stored:
    shape: Shape
    dtype: dtype
    path: Path
    offset: int
    strides: Shape


def is_mp_rank(directory: Path) -> bool:
    """Whether a step directory is of this form."""
    return any(directory.glob(f"mp_rank_*/{FILE}"))


def first_file(directory: Path) -> Path:
    """That of the first rank, which has the trainer's ``args`` beside its tensors."""
    return min(directory.glob(f"mp_rank_*/{FILE}"))


def content_of(file: Path) -> Any:
    """What a rank's file says, tensors as stubs."""
    return _read(file)[0]


class MpRankSource(FileSource[_Stored]):
    """The tensors of all ranks, each under ``TP.PP.EP.STAGE/NAME``: the last number is that of the
    rank's virtual pipeline stage.

    Args:
        path: ``iter_XXXXXXX`` or ``release``.

    Raises:
        UserError: a file is damaged or names something outside the allow-list; or the ranks are
            divided in a way that is not read.
        UserErrors: every rank that is missing.
    """

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self.objects: list[str] = []
        """Nothing: what is no tensor is not listed in this form."""
        first = first_file(self.path)
        args = safe_unpickle.arguments(content_of(first), first)
        if args is None and len(list(self.path.glob(f"mp_rank_*/{FILE}"))) > 1:
            what = "holds no arguments of Megatron-LM, which say how the ranks divide the model"
            raise UserError(str(first), what, _AGAIN)
        args = args or {}
        self.sizes = self._sizes(args)
        self.virtual_stages = self._size(args, "virtual_pipeline_model_parallel_size")
        experts = self._size(args, "num_experts") if args.get("num_experts") else 0
        self.local_experts = experts // self.sizes[2]
        tp, pp, ep = map(range, self.sizes)
        files = {rank: self._file(rank) for rank in itertools.product(tp, pp, ep)}
        missing = [UserError(str(f), "missing", _AGAIN) for f in files.values() if not f.is_file()]
        if missing:
            raise UserErrors(capped(missing))
        for rank, file in files.items():
            self._open(file)
            for stage, name, stored in _tensors(file, self.virtual_stages):
                self._stored[f"{'.'.join(map(str, (*rank, stage)))}/{name}"] = stored

    def _sizes(self, args: Mapping[str, Any]) -> Rank:
        kinds = ("tensor", "pipeline", "expert")
        tp, pp, ep = (self._size(args, f"{kind}_model_parallel_size") for kind in kinds)
        if tp * pp * ep > _MOST_RANKS:
            what = f"was saved by {tp} x {pp} x {ep} ranks, by its arguments"
            raise UserError(str(self.path), what, _AGAIN)
        etp = args.get("expert_tensor_parallel_size") or tp
        if args.get("num_experts") and etp != tp:
            what = f"has experts of tensor-parallel size {etp}, and all else of {tp}"
            raise UserError(str(self.path), what, "save it with --ckpt-format torch_dist")
        return tp, pp, ep

    def _size(self, args: Mapping[str, Any], name: str) -> int:
        size = args.get(name) or 1
        if type(size) is not int or not 0 < size <= MOST_EXPERTS:
            raise UserError(str(self.path), f"has an invalid {name}: {shown(repr(size))}", _AGAIN)
        return size

    def _file(self, rank: Rank) -> Path:
        tp, pp, ep = rank
        name = f"mp_rank_{tp:02d}"
        name += f"_{pp:03d}" if self.sizes[1] > 1 else ""
        name += f"_{ep:03d}" if self.sizes[2] > 1 else ""
        return self.path / name / FILE

    def read(self, name: str, box: Box) -> Tensor:
        """The elements of ``box``, mapped."""
        stored = self._counted(name, box)
        return read_box(stored.path, stored.offset, stored.dtype, stored.strides, box)


def joined(label: str, source: MpRankSource) -> dict[str, Expression]:
    """The whole model's tensors under the names that ``torch_dist`` gives them, layers and experts
    numbered.

    Raises:
        UserError: a rank lacks what its neighbours have, or has it in another shape.
    """
    parts: dict[str, dict[int, Expression]] = defaultdict(dict)
    offset = 0
    # The first virtual stage of every rank comes before the second of any.
    for virtual, stage in itertools.product(range(source.virtual_stages), range(source.sizes[1])):
        layers = 0
        for stored, (shape, kind) in source.tensors.items():
            ((tp, pp, ep), of), name = _parsed(stored)
            if (of, pp) != (virtual, stage):
                continue
            if match := _LAYER.fullmatch(name):
                layers = max(layers, int(match[1]) + 1)
            name, is_expert = global_name(name, offset, ep * source.local_experts)
            if ep == 0 or is_expert:
                parts[name].setdefault(tp, Take(label, stored, shape, kind))
        offset += layers
    wanted = set(range(source.sizes[0]))
    errors = []
    whole = {}
    for name, found in parts.items():
        shapes = sorted({part.shape for part in found.values()})
        try:
            if set(found) != wanted:
                raise ValueError("is missing on some tensor-parallel ranks")
            if len(shapes) > 1:
                raise ValueError(f"has several shapes on its tensor-parallel ranks: {shapes}")
            whole[name] = _whole(name, [found[tp] for tp in sorted(found)])
        except ValueError as error:
            errors.append(UserError(str(source.path), f"tensor {shown(name)} {error}", _AGAIN))
    if errors:
        raise UserErrors(capped(errors))
    return whole


def _whole(name: str, parts: list[Expression]) -> Expression:
    """A tensor from what each tensor-parallel rank has of it.

    Raises:
        ValueError: parts of that shape make up none.
    """
    if len(parts) == 1:
        return parts[0]
    shape = parts[0].shape
    if name.endswith(_GATED):  # each rank has its rows of the gate, then its rows of the up matrix
        if not shape or shape[0] % 2 or not shape[0]:
            raise ValueError(f"has the shape {shape} on a rank, which is no gate above an up part")
        half = shape[0] // 2
        return cat([*(rows(p, 0, half) for p in parts), *(rows(p, half, 2 * half) for p in parts)])
    dim = 0 if name.endswith(_ROWS) else 1 if name.endswith(_COLUMNS) else None
    if dim is not None and len(shape) <= dim:
        raise ValueError(f"has the shape {shape} on a rank, which is no part of a matrix")
    return parts[0] if dim is None else cat(parts, dim)


def _parsed(stored: str) -> tuple[Place, str]:
    place, _, name = stored.partition("/")
    tp, pp, ep, virtual = map(int, place.split("."))
    return ((tp, pp, ep), virtual), name


def global_name(name: str, layers: int = 0, experts: int = 0) -> tuple[str, bool]:
    """A module's name in the whole model, and whether it is an expert's; ``layers`` and ``experts``
    are those of earlier ranks."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return name, False
    stem, rest = f"decoder.layers.{int(match[1]) + layers}.", match[2]
    if one := _LOCAL_EXPERT.fullmatch(rest):
        expert, inner = int(one[1]), one[2]
    elif one := _GROUPED_EXPERT.fullmatch(rest):
        expert, inner = int(one[2]), one[1] + one[3]
    else:
        return stem + rest, False
    return f"{stem}mlp.experts.experts.{experts + expert}.{inner}", True


def _tensors(file: Path, stages: int) -> Iterator[tuple[int, str, _Stored]]:
    """The tensors of the model in a rank's file, or of each of its virtual stages: where their
    elements lie."""
    content, members = _read(file)
    for stage, key in enumerate(["model"] if stages == 1 else [f"model{n}" for n in range(stages)]):
        model = content.get(key) if isinstance(content, dict) else None
        if isinstance(model, dict) and "language_model" in model:
            raise UserError(str(file), _LEGACY, _TO_CORE)
        if not isinstance(model, dict):
            raise UserError(str(file), f"holds no `{key}`, which its arguments speak of", _AGAIN)
        for name, tensor in model.items():
            if isinstance(name, str) and not name.endswith("_extra_state"):
                try:
                    yield stage, name, _stored(file, tensor, members)
                except MALFORMED as error:
                    what = f"corrupt: {error}"
                    raise UserError(f"{file}: {shown(name)}", what, _AGAIN) from error


def _stored(file: Path, tensor: Any, members: Mapping[str, tuple[int, int]]) -> _Stored:
    (_, kind, key, _, _), first, shape, strides = tensor.arguments[:4]
    begin, nbytes = members[f"data/{key}"]
    first, shape, strides = sizes((first,))[0], sizes(shape), sizes(strides)
    last = first + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if not isinstance(kind, dtype) or (last + 1) * kind.itemsize > nbytes:
        raise ValueError(f"{told(kind)} {shape} in {nbytes} bytes")
    return _Stored(shape, kind, file, begin + first * kind.itemsize, strides)


def _read(file: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """What a rank's file says, and begin and size of every storage in it."""
    try:
        with file.open("rb") as opened:
            archive = StoredArchive(opened, Chunk((), file, 0, file.stat().st_size))
            archive.check_order(str(file))
            header = archive.read("data.pkl", safe_unpickle.LIMIT)
            members = {name: archive.member(name)[:2] for name in archive.names}
    except OSError as error:
        raise UserError(str(file), f"cannot be read: {error.strerror}", _AGAIN) from error
    except (*DAMAGED, *MALFORMED) as error:
        raise UserError(str(file), f"not what torch.save writes: {error}", _AGAIN) from error
    return safe_unpickle.loads(header, file, safe_unpickle.MP_RANK_NAMES), members
