"""The arguments with which NVIDIA's Megatron-LM loads and trains a checkpoint on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError
from megatron_btx.families.hf_routing import HFRouting
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import expert_width, kv_channels, query_groups
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.find_checkpoint import is_hugging_face
from megatron_btx.weights.manifest import MANIFEST
from megatron_btx.weights.megatron import names_lacking
from megatron_btx.weights.mp_rank import is_mp_rank
from megatron_btx.weights.plan import Checkpoint
from megatron_btx.weights.torch_dcp import is_torch_dcp

_TOKENIZERS = {"huggingface": "HuggingFaceTokenizer", "sentencepiece": "GPTSentencePieceTokenizer"}


def command_line(checkpoint: Checkpoint, tp: int) -> str:
    """The arguments as a shell takes them, under notes on what they cannot say.

    Args:
        checkpoint: opened from a directory.
        tp: tensor parallel size under which Megatron-LM will run.

    Raises:
        UserError: Megatron-LM has no argument for what the model computes, or would not load it.
    """
    words = [f"--{name} {value}".rstrip() for name, value in arguments(checkpoint, tp)]
    assert checkpoint.path is not None
    check_names(checkpoint.path, checkpoint.architecture)
    return (
        "# Megatron-LM looks for a directory of a fixed name below --load:\n"
        f"#   mkdir load && {_release(checkpoint.path.resolve())}\n"
        "#   echo release > load/latest_checkpointed_iteration.txt\n"
        + "".join(f"# {line}\n" for line in notes(checkpoint.architecture, tp))
        + " \\\n".join(words)
        + "\n"
    )


def _release(step: Path) -> str:
    """The command that makes ``load/release``: what ``--ckpt-format torch_dist`` reads. Any other
    form is converted to it."""
    where = shlex.quote(str(step))
    if is_hugging_face(step):
        return f"btx convert hf-to-megatron {where} load/release"
    if is_mp_rank(step) or is_torch_dcp(step):
        copy = "btx mix --method copy --format megatron"
        return f"{copy} --sources model={where} --out load/release"
    return f"ln -s {where} load/release"


def arguments(checkpoint: Checkpoint, tp: int) -> Iterator[tuple[str, Any]]:
    """Name and value of every argument; flags have an empty one.

    Raises:
        UserError: Megatron-LM has no argument for what the model computes.
    """
    yield from _model(checkpoint.architecture, tp)
    if checkpoint.architecture.experts:
        yield from _experts(checkpoint.architecture)
    tokenizer = checkpoint.manifest.get("tokenizer")
    if tokenizer and checkpoint.path:
        inside = checkpoint.path / "tokenizer"
        place = (inside if inside.is_dir() else checkpoint.path).resolve()
        whole = tokenizer["type"] == "huggingface"
        yield "tokenizer-type", _TOKENIZERS[tokenizer["type"]]
        yield "tokenizer-model", shlex.quote(str(place if whole else place / tokenizer["file"]))
    yield from {
        "tensor-model-parallel-size": tp,
        "ckpt-format": "torch_dist",
        "load": "load",
        "finetune": "",
        "no-load-optim": "",
        "no-load-rng": "",
    }.items()


def check_names(step: Path, architecture: Architecture) -> None:
    """That a step directory of ours is not one of an older version.

    Raises:
        UserError: Megatron-LM would end at names that it lacks.
    """
    if not (step / MANIFEST).exists():
        return
    lacking = names_lacking(step, architecture)
    if lacking:
        what = (
            f"was written by an older version: it lacks {lacking[0]} and {len(lacking) - 1} more "
            "of the names that Megatron-LM looks for"
        )
        fix = f"write it again: btx mix --method copy --format megatron --sources {step} --out NEW"
        raise UserError(str(step), what, fix)


def notes(architecture: Architecture, tp: int) -> Iterator[str]:
    """What the arguments cannot say, for people."""
    model = architecture.model
    if model.rope_scaling and model.rope_scaling_factor != 8:
        yield "Megatron-LM (megatron-core 0.17 to 0.19) drops --rope-scaling-factor for 8: after"
        yield "  config = gpt_config_from_args(args)"
        yield f"  config.rope_scaling_factor = {model.rope_scaling_factor}"
    if more := -architecture.vocab_size % tp:
        yield f"{more} row(s) of zeros pad the vocabulary for TP {tp}, and count in its loss"
    if architecture.experts:
        yield "--moe-grouped-gemm needs Transformer Engine, and computes the same"


def _model(architecture: Architecture, tp: int) -> Iterator[tuple[str, Any]]:
    model = architecture.model
    refuse_multipliers(model)
    if model.softmax_scale is not None:
        what = f"is {model.softmax_scale}; Megatron-LM has no argument for it"
        raise UserError("softmax_scale", what, "train it here")
    if tp < 1:
        raise UserError("--tensor-model-parallel-size", f"is {tp}", "give at least 1")
    yield from {
        "num-layers": model.num_layers,
        "hidden-size": model.hidden_size,
        "ffn-hidden-size": model.ffn_hidden_size,
        "num-attention-heads": model.num_attention_heads,
        "group-query-attention": "",
        "num-query-groups": query_groups(model),
        "kv-channels": kv_channels(model),
        "seq-length": model.seq_length,
        "max-position-embeddings": model.max_position_embeddings or model.seq_length,
        "position-embedding-type": "rope",
        "rotary-base": _whole("rotary_base", model.rotary_base),
        "normalization": "RMSNorm",
        "norm-epsilon": model.layernorm_epsilon,
        "swiglu": "",
        "disable-bias-linear": "",
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "init-method-std": model.init_method_std,
        "vocab-size": architecture.vocab_size,
        # It rounds up to a multiple of this and of TP; rows that are stored beyond are not loaded.
        "make-vocab-size-divisible-by": 1,
        # Else it counts its tokenizer's, of which a model may have more.
        "padded-vocab-size": -(-architecture.vocab_size // tp) * tp,
    }.items()
    if model.untie_embeddings_and_output_weights:
        yield "untie-embeddings-and-output-weights", ""
    if model.add_qkv_bias:
        yield "add-qkv-bias", ""
    if model.qk_layernorm:
        yield "qk-layernorm", ""
    if model.rope_scaling:
        yield "use-rope-scaling", ""
        yield "rope-scaling-factor", model.rope_scaling_factor
    if (factor := model.seq_len_interpolation_factor) is not None:
        whole = _whole("seq_len_interpolation_factor", factor)
        yield "rotary-seq-len-interpolation-factor", whole
    if model.window_size is not None:
        yield "window-size", ",".join(map(str, model.window_size))
    if model.window_attn_skip_freq is not None:
        yield "window-attn-skip-freq", shlex.quote(str(list(model.window_attn_skip_freq)))
    if model.no_rope_freq is not None:
        yield "no-rope-freq", shlex.quote(str(list(model.no_rope_freq)))


def refuse_multipliers(model: Model) -> None:
    """That the model has none of those that Megatron's own layers lack.

    Raises:
        UserError: it has one.
    """
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if (value := getattr(model, name)) != 1:
            what = f"is {value}, which Megatron's own layers do not compute"
            raise UserError(name, what, "train it here, or export it to Hugging Face")


def _experts(architecture: Architecture) -> Iterator[tuple[str, Any]]:
    model, gates = architecture.model, HFRouting.of(architecture)
    if gates.k == 1 and gates.normalised:
        what = "routes to one expert with weight 1; Megatron-LM's top-1 takes its probability"
        raise UserError("routing", what, "keep it in this project, or export it")
    yield from {
        "num-experts": len(architecture.experts),
        "moe-ffn-hidden-size": expert_width(model),
        "moe-router-topk": gates.k,
        "moe-router-dtype": "fp32",
    }.items()
    if not gates.normalised:
        yield "moe-router-pre-softmax", ""
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        yield "moe-shared-expert-intermediate-size", shared
        if model.moe_shared_expert_gate:
            yield "moe-shared-expert-gate", ""


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise UserError(name, f"is {value}; Megatron-LM takes whole numbers", "train it here")
    return int(value)
