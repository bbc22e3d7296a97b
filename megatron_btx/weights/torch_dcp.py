"""``--ckpt-format torch_dcp`` and ``fsdp_dtensor`` of Megatron-LM: ``torch.distributed.checkpoint``
without Megatron-Core's names.

The bytes lie as in ``torch_dist`` (weights/torch_dist.py reads them), under ``model.`` and the
names of the modules: layers one by one, experts one by one (counted over all ranks), of
``fsdp_dtensor`` the gate and the up matrix apart (``handle_swiglu_in_state_dict`` of
``megatron.core.transformer.fsdp_dtensor_checkpoint``). The arguments are the object ``args``.
Neither form divides a model's names over ranks but for pipeline parallelism, which is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors, capped, shown
from megatron_btx.weights.arrange import Take
from megatron_btx.weights.expression import Expression
from megatron_btx.weights.mp_rank import global_name
from megatron_btx.weights.torch_dist import TorchDistSource

ARGUMENTS = "args"
"""The object that holds the trainer's."""

_WEIGHT = re.compile(r"model\.(?:module\.)*(.+)")
_OTHERS = re.compile(
    r"(args|checkpoint_version|iteration|optimizer|opt_param_scheduler|rng_state|content_metadata"
    r"|rerun_state_machine|num_floating_point_operations_so_far)(\..*)?|.*\._extra_state(\..*)?"
)
"""What is no weight: settings, and the state of a training run."""


def is_torch_dcp(directory: Path) -> bool:
    """Whether a step directory is of either form: Megatron-Core's own has a ``metadata.json``."""
    metadata, own = directory / ".metadata", directory / "metadata.json"
    return metadata.is_file() and not own.is_file()


def joined(label: str, source: TorchDistSource) -> dict[str, Expression]:
    """The model's tensors under the names that ``torch_dist`` gives them, layers and experts
    numbered.

    Raises:
        UserErrors: what is stored and is neither a weight nor the state of a training run.
    """
    found: dict[str, Expression] = {}
    errors = []
    for name in [*source.tensors, *source.objects]:
        weight = _WEIGHT.fullmatch(name)
        if _OTHERS.fullmatch(name):
            continue
        if weight is None or name in source.objects:
            what = f"holds {shown(name)}, which is neither a weight nor a run's state"
            fix = "copy it again with its metadata.json, or save it with --ckpt-format torch_dist"
            errors.append(UserError(str(source.path), what, fix))
            continue
        shape, dtype = source.tensors[name]
        found[global_name(weight[1])[0]] = Take(label, name, shape, dtype)
    if errors:
        raise UserErrors(capped(errors))
    return found
