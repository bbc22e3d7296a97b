"""Our layers for NVIDIA's own script: ``--spec megatron_btx.engine.megatron_lm_spec topk``.

``megatron.training`` of Megatron-Core 0.19 calls what ``--spec`` names with its ``GPTModelConfig``.
One function for each routing function of the paper; everything else of a routing is read from the
script's own arguments (``--moe-router-topk``, ``--moe-expert-capacity-factor``,
``--moe-z-loss-coeff``). Other numbers than the paper's are three lines of your own::

    from megatron_btx import Routing, megatron_lm_spec
    half = megatron_lm_spec(Routing(type="topk", balance_loss_coeff=0.005))

for ``--spec my_routing half``. What these layers or this router would not follow is refused before
the model is built. (A ``--spec`` that cannot be imported is passed over by the script, with its own
layers in place: look for the line that this module prints.)
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from megatron_btx.engine import platform
from megatron_btx.engine.moe.noise import set_routing_context
from megatron_btx.engine.moe.router_config import ROUTER_OPTIONS, transformer_fields
from megatron_btx.engine.spec import block_spec
from megatron_btx.engine.unsupported_options import TORCH_LAYERS, Supported
from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.recipe import megatron_fields
from megatron_btx.recipe.messages import flag_of
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.megatron_lm_args import architecture_of

Spec: TypeAlias = ModuleSpec | TransformerBlockSubmodules

_LAYERS: Supported = {
    "activation_func": (silu,),
    "experimental_attention_variant": (None,),
    "is_hybrid_model": (False,),
    "heterogeneous_block_specs": (False,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_padding_for_fp8": (False, None),
    "moe_router_padding_for_quantization": (False, None),
    "use_kitchen": (False,),
}
"""What the layers follow, of either kind, beyond the settings that no checkpoint is read with."""


def topk(config: Any, vp_stage: int | None = None) -> Spec:
    """``SoftMax(TopK(W x))`` (section 3.2): k is ``--moe-router-topk``, alpha 0.01."""
    return _routed(_of_arguments("topk", config), config, vp_stage)


def switch(config: Any, vp_stage: int | None = None) -> Spec:
    """Switch as the paper has it: ``--moe-router-topk 1 --moe-router-pre-softmax
    --moe-expert-capacity-factor 1.5 --moe-token-drop-policy position``."""
    return _routed(_of_arguments("switch", config), config, vp_stage)


def sample_top1(config: Any, vp_stage: int | None = None) -> Spec:
    """Sample Top-1: ``--moe-router-topk 1 --moe-router-pre-softmax``. Its noise is that of the
    script's iteration and the samples' numbers, seeded by ``--seed``."""
    return _routed(_of_arguments("sample_top1", config), config, vp_stage)


def soft(config: Any, vp_stage: int | None = None) -> Spec:
    """All experts: ``--moe-router-topk`` is their number."""
    return _routed(_of_arguments("soft", config), config, vp_stage)


def megatron_lm_spec(routing: Routing) -> Callable[..., Spec]:
    """What ``--spec`` takes, for any routing.

    Args:
        routing: must say what the script's arguments say too.
    """

    def spec(config: Any, vp_stage: int | None = None) -> Spec:
        return _routed(routing, config, vp_stage)

    return spec


def _of_arguments(kind: Any, config: Any) -> Routing:
    """The paper's routing of that kind, with what the script's own arguments say of it."""
    given = config.transformer
    fields: dict[str, Any] = {
        name: getattr(given, name)
        for name in ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff")
    }
    if kind == "topk":
        names = ("moe_router_topk", "moe_router_pre_softmax")
        fields |= {name: getattr(given, name) for name in names}
    if kind == "switch" and given.moe_expert_capacity_factor is not None:
        fields["moe_expert_capacity_factor"] = given.moe_expert_capacity_factor
    return Routing(type=kind, **fields)


def _routed(routing: Routing, config: Any, vp_stage: int | None) -> Spec:
    """The layers of this pipeline stage.

    Raises:
        UserErrors: every argument that they would not follow.
    """
    given: TransformerConfig = config.transformer
    machine = platform.detect()
    if given.transformer_impl == "local":
        machine = dataclasses.replace(machine, transformer_engine=False)
    errors = list(_unfollowed(given, machine))
    with collect_errors(errors):
        # What could not be read back is not trained either.
        architecture_of({**vars(given), **_plain(config)}, "--spec")
    if given.num_moe_experts is None:
        errors.append(UserError("--num-experts", "is not given", "--spec is of MoE layers"))
    else:
        errors += _disagreeing(routing, given)
    errors += _of_script(machine)
    if errors:
        raise UserErrors(errors)
    if routing.type == "sample_top1":
        given.moe_expert_capacity_factor = float(given.num_moe_experts)  # see transformer_fields
        if _number_micro_batches not in config.pre_wrap_hooks:
            config.pre_wrap_hooks.append(_number_micro_batches)
    _keep_rope_factor(config)
    _say(routing, given)
    seed = getattr(_script(), "seed", 0)
    return block_spec(given, routing, seed, machine, vp_stage)


def _plain(config: Any) -> dict[str, Any]:
    """The fields of the script's ``GPTModelConfig`` that say what the model is."""
    known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del known["transformer"]
    return known


def _unfollowed(given: TransformerConfig, machine: platform.Platform) -> Iterator[UserError]:
    """Fields of the configuration that the layers or the router would pass over."""
    torch_layers = machine.layers == "torch"
    supported = {
        **_LAYERS,
        **ROUTER_OPTIONS,
        **(TORCH_LAYERS if torch_layers else {"moe_grouped_gemm": (True,)}),
        "transformer_impl": ("local",) if torch_layers else ("transformer_engine",),
    }
    plain = TransformerConfig(num_layers=1, hidden_size=1, num_attention_heads=1)
    later = {
        name: (getattr(plain, name),)
        for name in megatron_fields.UNTRIED["transformer"]
        if not name.endswith("_num_weight_shards")  # of TP, and of a field of its own
    }
    for name, values in (later | supported).items():
        if hasattr(given, name) and getattr(given, name) not in values:
            who = "our layers without Transformer Engine" if torch_layers else "our layers"
            what = f"{getattr(given, name)!r} is not followed by {who}"
            yield UserError(flag_of(name), what, f"only {' or '.join(map(str, values))}")


def _disagreeing(routing: Routing, given: TransformerConfig) -> Iterator[UserError]:
    """Where the script's arguments say another routing than ours."""
    assert given.num_moe_experts is not None
    wanted = transformer_fields(routing, given.num_moe_experts)
    if routing.type == "sample_top1":  # how the dispatcher is told; not a user's choice
        wanted["moe_expert_capacity_factor"] = None
    if routing.type == "switch":
        wanted["moe_token_drop_policy"] = "position"
    coefficient = (given.moe_aux_loss_coeff, wanted["moe_aux_loss_coeff"])
    if coefficient == (0, 0):  # the kind of a loss that has no weight
        del wanted["moe_router_load_balancing_type"]
    for name, value in wanted.items():
        if name != "moe_router_dtype" and getattr(given, name) != value:
            what = f"is {getattr(given, name)!r}, and {routing.type} routes with {value!r}"
            yield UserError(flag_of(name), what, _said(name, value))
    if given.tensor_model_parallel_size > 1 and not given.sequence_parallel:
        what = "experts under tensor parallelism need it: else every rank routes the same tokens"
        yield UserError("--sequence-parallel", what, "say --sequence-parallel")


def _said(name: str, value: Any) -> str:
    """How an argument is given that value."""
    if value is None or value is False:
        return f"remove {flag_of(name)}"
    return f"say {flag_of(name)}" + ("" if value is True else f" {value}")


def _script() -> Any:
    """The script's arguments; ``None`` where another program builds the model."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_ARGS


def _of_script(machine: platform.Platform) -> Iterator[UserError]:
    script = _script()
    if machine.layers != "torch" or script is None:
        return
    what = "attention without Transformer Engine is causal over the whole sequence"
    if script.reset_attention_mask:
        yield UserError("--reset-attention-mask", what, "remove it")
    if script.create_attention_mask_in_dataloader:
        fix = "say --no-create-attention-mask-in-dataloader"
        yield UserError("attention mask", f"is made by the data loader; {what}", fix)


def _keep_rope_factor(config: Any) -> None:
    """``gpt_config_from_args`` (0.17 to 0.19) drops ``--rope-scaling-factor`` for 8."""
    factor = getattr(_script(), "rope_scaling_factor", None)
    if config.rope_scaling and factor is not None:
        config.rope_scaling_factor = factor


def _say(routing: Routing, given: TransformerConfig) -> None:
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    said = {
        "type": routing.type,
        "experts": given.num_moe_experts,
        "k": given.moe_router_topk,
        "balance_loss_coeff": routing.balance_loss_coeff,
        "moe_aux_loss_coeff": routing.moe_aux_loss_coeff,
    }
    words = ", ".join(f"{name} {value}" for name, value in said.items())
    sys.stdout.write(f"megatron_btx routes: {words}\n")


def _number_micro_batches(models: list[Any]) -> list[Any]:
    """Have every part of the model know, before it runs, which micro-batch of which step it runs
    (:mod:`megatron_btx.engine.moe.noise`)."""
    for model in models:
        model.register_forward_pre_hook(_MicroBatches())
    return models


class _MicroBatches:
    """Counts the micro-batches of an iteration of the script, each as the sampler of Megatron-LM
    numbers its samples: ``consumed + (micro-batch x ranks + rank) x size + row``."""

    def __init__(self) -> None:
        self._of: tuple[int, bool] | None = None
        self._count = 0

    def __call__(self, model: torch.nn.Module, _inputs: Any) -> None:
        script = _script()
        of = (script.curr_iteration, model.training)
        if of != self._of:
            self._of, self._count = of, 0
        ranks = parallel_state.get_data_parallel_world_size()
        size = script.micro_batch_size if model.training else script.eval_micro_batch_size
        first = (self._count * ranks + parallel_state.get_data_parallel_rank()) * size
        first += script.consumed_train_samples if model.training else 0
        device = torch.cuda.current_device()
        set_routing_context(of[0], torch.arange(first, first + size, device=device))
        self._count += 1
