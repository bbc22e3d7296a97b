"""Checkpoints: Megatron's ``torch_dist`` format plus a manifest, found only when whole.

A checkpoint is written into a directory of another name and renamed when every rank's part is on
disk; a directory ``step_00000123`` can be loaded, however the writer ended.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_btx.engine import (
    checkpoint_directory,
    checkpoint_hashes,
    checkpoint_plan,
    optimizer_shards,
)
from megatron_btx.engine.distributed import from_first_rank, is_first_rank
from megatron_btx.engine.freezing import numbered
from megatron_btx.engine.megatron_release import SAVE_TAKES_STRATEGY
from megatron_btx.engine.model import gather_parameters, model_chunks, unwrap
from megatron_btx.errors import UserError
from megatron_btx.files import sync_directory, write_json, written
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.read_architecture import ENTRIES, from_manifest
from megatron_btx.weights.claimed_directory import write_small
from megatron_btx.weights.file_hashes import HASHES, files_of, hash_file, hashes_json
from megatron_btx.weights.manifest import FORMAT, MANIFEST, read_manifest
from megatron_btx.weights.megatron import extra_states, second_names
from megatron_btx.weights.torch_dist import read_metadata

_agreed: WeakKeyDictionary[object, checkpoint_plan.Agreed] = WeakKeyDictionary()
"""Cache: the plan of what the ranks write, by model or optimizer, once Megatron has found that it
covers every tensor."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """All that a resumed run needs. The position in the data is the step: samples are a function
    of it."""

    model: torch.nn.Module
    optimizer: MegatronOptimizer | None = None
    schedule: OptimizerParamScheduler | None = None

    def sharded(self, is_loading: bool) -> dict[str, Any]:
        """Megatron's sharded state dict of it, as saved and as asked for when loading."""
        metadata = _metadata()
        model_part = model_sharded_state_dict(self.model)
        state: dict[str, Any] = {"model": model_part}
        if self.optimizer is not None:
            assert self.schedule is not None
            first = unwrap(model_chunks(self.model)[0])  # of several all are frozen alike
            own = numbered(first, model_part)
            state["optimizer"] = (
                self.optimizer.sharded_state_dict(own, is_loading=True, metadata=metadata)
                if is_loading
                else optimizer_shards.sharded_state(self.optimizer, own, metadata)
            )
            state["opt_param_scheduler"] = self.schedule.state_dict()
            state["rng_state"] = _rng_state()
        return state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": optimizer_shards.FORM,
        # Gathered through gloo where there is no NCCL; what is stored is the same.
        "distrib_optim_fully_reshardable_mem_efficient": not torch.cuda.is_available(),
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def model_sharded_state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """The model's shards under their global names, whole; ``_extra_state`` (Transformer Engine's,
    tied to a layout) left out. Every rank calls it. Keys are the module's own; of a model in
    several :func:`model_chunks` each begins with its number."""
    gather_parameters(model)
    chunks = model_chunks(model)
    sharded: dict[str, Any] = {}
    for at, chunk in enumerate(chunks):
        own = unwrap(chunk).sharded_state_dict(metadata=_metadata())
        sharded |= {_key(key, at, len(chunks)): value for key, value in own.items()}
    return {key: value for key, value in sharded.items() if not key.endswith("._extra_state")}


def _key(key: str, at: int, chunks: int) -> str:
    return key if chunks == 1 else f"{at}.{key}"


def _load_weights(model: torch.nn.Module, loaded: dict[str, Any]) -> None:
    """Put what was read under :func:`model_sharded_state_dict`'s keys into the model.

    Raises:
        KeyError: there is more, or less.
    """
    chunks = model_chunks(model)
    wrong = []
    for at, chunk in enumerate(chunks):
        start = _key("", at, len(chunks))
        own = {
            key.removeprefix(start): each for key, each in loaded.items() if key.startswith(start)
        }
        missing, unexpected = unwrap(chunk).load_state_dict(own, strict=False)
        wrong += [key for key in (*missing, *unexpected) if not key.endswith("._extra_state")]
    if wrong:
        raise KeyError(f"it and the model differ in {', '.join(wrong)}")


def _rng_state() -> ShardedObject:
    """This rank's generators. Nothing we train draws from them (no dropout); a user's
    ``megatron:`` options may."""
    states = {
        "torch": torch.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return ShardedObject("rng_state", states, (dist.get_world_size(),), (dist.get_rank(),))


def save(
    directory: Path,
    state: TrainingState,
    manifest: dict[str, Any],
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a whole checkpoint, or nothing under its name. Every rank calls it.

    Args:
        directory: the final name; its parent exists.
        state: what to write; without an optimizer, the model alone.
        manifest: see ``manifest_of``; written last.
        add_files: puts more files into the directory before it gets its name (the tokenizer).

    Raises:
        UserError: the disk is full or the directory cannot be written.
    """
    with checkpoint_directory.disk_errors(directory):
        planned = plan(directory, state, manifest)
        data = checkpoint_plan.on_the_host(planned.data)
        partial = checkpoint_directory.partial_of(directory)
        outcomes = checkpoint_plan.to_first_rank(
            checkpoint_plan.write(partial, dist.get_rank(), data)
        )
        error = None
        try:
            if is_first_rank():
                complete(directory, planned, outcomes, manifest, add_files)
        except Exception as what:
            error = what
        error = from_first_rank(error)
        if error is not None:
            raise error


def plan(
    directory: Path, state: TrainingState, manifest: dict[str, Any]
) -> checkpoint_plan.Strategy:
    """What every rank has to write, agreed on; the partial directory is made. Every rank calls
    it."""
    partial = checkpoint_directory.partial_of(directory)
    if is_first_rank():
        checkpoint_directory.make_room(partial)
        partial.mkdir(parents=True)
    saved: object = state.model if state.optimizer is None else state.optimizer
    strategy = checkpoint_plan.Strategy(_agreed.get(saved))
    content = state.sharded(is_loading=False)
    if more := _for_megatron_lm(content["model"], _architecture(manifest)):
        content["megatron_lm"] = more  # an empty one is not taken out, and would be warned of
    dist_checkpointing.save(
        {**content, "checkpoint_version": 3.0},
        str(partial),
        strategy,
        validate_access_integrity=saved not in _agreed,
        async_sharded_save=True,
        content_metadata=_saved_form(),
        **({"async_strategy": "mcore"} if SAVE_TAKES_STRATEGY else {}),
    )
    assert strategy.agreed is not None
    _agreed[saved] = strategy.agreed
    return strategy


def complete(
    directory: Path,
    planned: checkpoint_plan.Strategy,
    outcomes: Sequence[checkpoint_plan.Written | Exception],
    manifest: dict[str, Any],
    add_files: Callable[[Path], None] | None,
) -> None:
    """Add what one rank writes for all to what all have written, and give it its name. The first
    rank calls it, and no other takes part.

    Args:
        directory: the final name.
        planned: as :func:`plan` returned it.
        outcomes: what every rank has written.
        manifest: written now.
        add_files: as of :func:`save`.

    Raises:
        OSError: the disk, on whichever rank.
    """
    partial = checkpoint_directory.partial_of(directory)
    assert planned.agreed is not None
    checkpoint_plan.finish(partial, planned.agreed, outcomes)
    _write_common(partial)
    if add_files is not None:
        add_files(partial)
    write_json(partial / MANIFEST, manifest)
    hashes: dict[str, str] = {}
    for one in outcomes:
        hashes |= one.hashes if isinstance(one, checkpoint_plan.Written) else {}
    left = set(files_of(partial)) - hashes.keys()
    hashes |= {name: hash_file(partial / name) for name in left}
    write_small(partial / HASHES, hashes_json(hashes))
    checkpoint_directory.make_room(directory)
    os.rename(partial, directory)
    sync_directory(directory.parent)


def _architecture(manifest: Mapping[str, Any]) -> Architecture:
    """A manifest's, read once and not at every save."""
    entries = {key: manifest[key] for key in ENTRIES if key in manifest}
    return _read_architecture(json.dumps(entries))


@functools.lru_cache(8)
def _read_architecture(entries: str) -> Architecture:
    return from_manifest(json.loads(entries), Path(MANIFEST))


def _for_megatron_lm(model: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """What Megatron's layer specs look for and ours do not: see weights/megatron.py."""
    names = second_names(architecture)
    more: dict[str, Any] = {
        f"{key} again": replace(tensor, key=names[tensor.key])
        for key, tensor in model.items()
        if tensor.key in names
    }
    for key, shape, offset in extra_states(architecture) if is_first_rank() else ():
        state = ShardedObject(key, None, shape, offset)
        more[state.unique_key] = state
    return more


def _write_common(directory: Path) -> None:
    """``common.pt``: what is stored once for all ranks. 0.19 stores it in a ``.distcp`` alone, and
    would load it from here too, as 0.16 does."""
    path = directory / "common.pt"
    if not path.exists():
        with written(path, "wb") as file:
            torch.save(dist_checkpointing.load_common_state_dict(str(directory)), file)


def _saved_form() -> dict[str, Any]:
    return {key: value for key, value in _metadata().items() if key != "dp_cp_group"}


def load(directory: Path, state: TrainingState) -> None:
    """Fill the state from a whole checkpoint, under any layout. Every rank calls it.

    Raises:
        UserError: the checkpoint is missing, damaged or of another shape; or it holds a pickle that
            names something outside the allow-list.
    """
    checkpoint_directory.wait_until_seen(directory)
    read_manifest(directory)
    read_metadata(directory)
    checkpoint_hashes.check_hashes(directory)
    sharded = state.sharded(is_loading=True)
    rng = sharded.pop("rng_state", None)
    if rng is not None and _same_world(directory):
        sharded["rng_state"] = rng
    with _load_errors(directory), checkpoint_hashes.guarded(directory):
        loaded = dist_checkpointing.load(sharded, str(directory))
        _load_weights(state.model, loaded["model"])
        if state.optimizer is not None:
            assert state.schedule is not None
            state.optimizer.load_state_dict(loaded["optimizer"])
            state.schedule.load_state_dict(loaded["opt_param_scheduler"])
            if "rng_state" in loaded:
                _restore_rng(loaded["rng_state"])


@contextlib.contextmanager
def _load_errors(directory: Path) -> Iterator[None]:
    """What Megatron's loader makes of a checkpoint that it cannot use, in a user's words."""
    try:
        yield
    except (
        *(CheckpointingException, CheckpointException, OSError, EOFError),
        *(KeyError, ValueError, RuntimeError, pickle.PickleError),
    ) as error:
        for cause, _ in getattr(error, "failures", {}).values():  # on whichever rank
            if isinstance(cause, UserError):
                raise cause from error
        lines = str(error).splitlines() or [repr(error)]
        # Its optimizers group experts apart only under expert parallelism: between EP > 1 and
        # EP = 1 the weights move, the state of the optimizer does not.
        raise UserError(
            str(directory),
            f"cannot be loaded: {type(error).__name__}: {lines[0][:300]}",
            "go on under the layout that wrote it, or take a checkpoint that is whole and of this "
            "model (a stage's own may be deleted: it goes on from the one before)",
        ) from error


def _same_world(directory: Path) -> bool:
    _, manifest = read_manifest(directory)
    return manifest["layout"].get("world_size") == dist.get_world_size()


def _restore_rng(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def manifest_of(architecture: Architecture, **entries: Any) -> dict[str, Any]:
    """A manifest: the architecture plus the entries that the caller knows (``precision``,
    ``step``, ``consumed_samples``, ``tokens``, ``tokenizer``, ``layout``, ``lineage``, ...)."""
    return {"format": FORMAT, **architecture.to_json(), **entries}
