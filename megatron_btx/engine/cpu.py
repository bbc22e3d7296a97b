"""The CPU as a platform: what stands in for CUDA, line by line, so that Megatron-Core trains on
gloo ranks with the same code that runs on GPUs.

Tables say everything that is replaced and why, with the rows of one release apart. ``install()``
applies them once, explicitly, before a model is built; where CUDA is present it does nothing. A row
whose upstream symbol no longer exists, or no longer contains what is replaced, fails loudly: that
is how an upgrade of Megatron-Core is noticed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_btx.engine import cpu_tuning
from megatron_btx.engine.megatron_release import RELEASE, require_supported, silence_warnings
from megatron_btx.engine.moe import dispatch

_DEVICE = torch.device("cpu")

# All of Megatron that we use, imported while torch.compile is out of the way.
_IMPORTED = (
    "megatron.core",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.dist_checkpointing.strategies.torch",
)

# (module, function, literal, replacement). A literal is a constant in the function's code.
# `device="cuda"` would fail to allocate; `tensor.type()` of a CPU tensor lacks the `cuda.`.
_OF_RELEASE: dict[tuple[int, ...], tuple[tuple[str, ...], ...]] = {
    (0, 16): (("transformer.moe.moe_utils", "track_moe_metrics", "cuda", "cpu"),),
    (0, 19): (("optimizer.optimizer", "MegatronOptimizer.has_grad_norm_group", "cuda", "cpu"),),
}
_LITERALS: tuple[tuple[str, str, dict[str, str]], ...] = tuple(
    (f"megatron.core.{module}", function, dict(zip(replaced[::2], replaced[1::2], strict=True)))
    for module, function, *replaced in (
        ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__", "cuda", "cpu"),
        ("optimizer.optimizer", "FP32Optimizer.__init__", "cuda", "cpu"),
        (
            "optimizer.optimizer",
            "Float16OptimizerWithFloat16Params.__init__",
            *("torch.cuda.HalfTensor", "torch.HalfTensor"),
            *("torch.cuda.BFloat16Tensor", "torch.BFloat16Tensor"),
            *("torch.cuda.FloatTensor", "torch.FloatTensor"),
        ),
        (
            "optimizer.distrib_optimizer",
            "DistributedOptimizer._build_model_and_main_param_groups",
            *("torch.cuda.HalfTensor", "torch.HalfTensor"),
            *("torch.cuda.BFloat16Tensor", "torch.BFloat16Tensor"),
            *("torch.cuda.FloatTensor", "torch.FloatTensor"),
        ),
        (
            "optimizer.distrib_optimizer",
            "DistributedOptimizer.__init__",
            *("torch.cuda.HalfTensor", "torch.HalfTensor"),
            *("torch.cuda.BFloat16Tensor", "torch.BFloat16Tensor"),
        ),
        ("optimizer.clip_grads", "get_grad_norm_fp32", "cuda", "cpu"),
        (
            "optimizer.clip_grads",
            "clip_grad_by_total_norm_fp32",
            *("cuda", "cpu", "torch.cuda.FloatTensor", "torch.FloatTensor"),
        ),
        ("optimizer.clip_grads", "count_zeros_fp32", "cuda", "cpu"),
        ("pipeline_parallel.schedules", "forward_backward_no_pipelining", "cuda", "cpu"),
        (
            "pipeline_parallel.schedules",
            "forward_backward_pipelining_with_interleaving",
            *("cuda", "cpu"),
        ),
        (
            "pipeline_parallel.schedules",
            "forward_backward_pipelining_without_interleaving",
            *("cuda", "cpu"),
        ),
        ("utils", "local_multi_tensor_l2_norm", "cuda", "cpu"),
        ("dist_checkpointing.strategies.state_dict_saver", "verify_global_md_reuse", "cuda", "cpu"),
        *_OF_RELEASE.get(RELEASE, ()),
    )
)


class _Stream:
    """A CUDA stream on a machine where everything already runs in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, _other: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Stream:
        """Waiting for an event does nothing, as for a stream."""
        return self


_ONLY_STREAM = _Stream()


@contextlib.contextmanager
def _stream(_stream: object) -> Iterator[None]:
    yield


# What Megatron asks of torch.cuda, and what a machine without CUDA answers.
#   current_device             `device=` of many allocations
#   Stream, stream, ...        side streams of DDP and of the MoE dispatcher: here is one, in order
#   *_rng_state, manual_seed   the CPU's generator is the device's generator
# No function appears twice: torch.compile's tables map each to one name.
_TORCH_CUDA: dict[str, Any] = {
    "current_device": lambda: _DEVICE,
    "set_device": lambda *_: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "Stream": _Stream,
    "current_stream": lambda *_: _ONLY_STREAM,
    "default_stream": lambda *_: _ONLY_STREAM,
    "stream": _stream,
    "manual_seed": lambda seed: torch.manual_seed(seed),
    "get_rng_state": lambda *_, **__: torch.get_rng_state(),
    "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
}


def _cpu_rng_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> Any:
    """For ``tensor_parallel.random._get_cuda_rng_state``: CUDA graphs do not exist here."""
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """For ``tensor_parallel.random._set_cuda_rng_state``, which reaches for CUDA's generators."""
    torch.set_rng_state(state)


def _move_to_cpu(
    tensor: Any, as_numpy: bool = False, record_stream: bool = False
) -> torch.Tensor | Any:
    """For ``moe_utils.maybe_move_tensor_to_cpu``: upstream honours ``as_numpy`` only for a tensor
    that is on a GPU, and ``all_to_all_single`` refuses tensors as split sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


# The dispatchers' own functions add rows up by scattering, and copy chunks that are in order.
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"

# (module, name, replacement, every other module that has imported the name)
_FUNCTIONS: tuple[tuple[str, str, Callable[..., Any], tuple[str, ...]], ...] = (
    ("megatron.core.tensor_parallel.random", "_get_cuda_rng_state", _cpu_rng_state, ()),
    ("megatron.core.tensor_parallel.random", "_set_cuda_rng_state", _set_cpu_rng_state, ()),
    (
        "megatron.core.transformer.moe.moe_utils",
        "maybe_move_tensor_to_cpu",
        _move_to_cpu,
        (_DISPATCHER,),
    ),
    (_DISPATCHER, "permute", dispatch.permute, ()),
    (_DISPATCHER, "unpermute", dispatch.unpermute, ()),
    (_DISPATCHER, "sort_chunks_by_idxs", dispatch.sort_chunks_by_idxs, ()),
)


@functools.cache
def install() -> bool:
    """Let Megatron-Core run on this machine's CPU. Call it before anything else of Megatron.

    Returns:
        True where the stand-ins are in place, False where CUDA is present and none is needed.

    Raises:
        UserError: this release of Megatron-Core is not supported.
        LookupError: an upstream symbol that a row names has changed.
    """
    require_supported()
    silence_warnings()
    if torch.cuda.is_available():
        return False
    cpu_tuning.install()
    with _lean_imports():
        for module_name in _IMPORTED:
            importlib.import_module(module_name)
    for name, stand_in in _TORCH_CUDA.items():
        setattr(torch.cuda, name, stand_in)
    # Tied embeddings over pipeline stages are moved by it before they are compared.
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[assignment,method-assign]
    for module_name, path, literals in _LITERALS:
        _replace_literals(_lookup(module_name, path), literals, f"{module_name}.{path}")
    for module_name, name, stand_in, importers in _FUNCTIONS:
        for target in (module_name, *importers):
            module = importlib.import_module(target)
            if not hasattr(module, name):
                raise LookupError(f"{target}.{name} is gone from this Megatron-Core")
            setattr(module, name, stand_in)
    return True


@contextlib.contextmanager
def _lean_imports() -> Iterator[None]:
    """Megatron decorates small functions with torch.compile at import: on a CPU that costs seconds
    of every start and needs a C++ compiler, so its imports see a decorator that does nothing. Nor
    do they see wandb, which its inference engine would log to (together 3.5 s of CPU to 2.0)."""
    compile_, wandb = torch.compile, "wandb" in sys.modules
    torch.compile = lambda model=None, **_: model  # type: ignore[assignment]
    # With a torch for CUDA and nvcc, but no GPU, it warns that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if not wandb:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compile_
        if not wandb:
            del sys.modules["wandb"]


def _lookup(module_name: str, path: str) -> types.FunctionType:
    """The plain function behind ``module.path`` (a decorated one is unwrapped)."""
    found: Any = importlib.import_module(module_name)
    for part in path.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise LookupError(f"{module_name}.{path} is gone from this Megatron-Core")
    found = getattr(found, "__func__", found)  # a classmethod
    while hasattr(found, "__wrapped__"):
        found = found.__wrapped__
    return found


def _replace_literals(function: types.FunctionType, literals: dict[str, str], where: str) -> None:
    """Replace string constants in a function's code, those in tuples and inner functions too."""
    missing = set(literals)

    def replaced(constant: Any) -> Any:
        if isinstance(constant, str) and constant in literals:
            missing.discard(constant)
            return literals[constant]
        if isinstance(constant, tuple):
            return tuple(replaced(item) for item in constant)
        if isinstance(constant, types.CodeType):
            return constant.replace(co_consts=tuple(replaced(c) for c in constant.co_consts))
        return constant

    function.__code__ = replaced(function.__code__)
    if missing:
        raise LookupError(f"{where} no longer contains {sorted(missing)}")
