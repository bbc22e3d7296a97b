"""What a Megatron checkpoint that is not ours says of its model.

Megatron-LM keeps its command line (an ``argparse.Namespace``) in ``common.pt`` or, from
Megatron-Core 0.19 on, in the object ``common_state`` among the tensors; Megatron-Bridge its
configuration in ``run_config.yaml``. Both say nearly the same words, those of Megatron-Core. Every
one that changes what the model computes is mapped or asserted.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors, collect_errors
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.fields import Range
from megatron_btx.recipe.messages import near_key
from megatron_btx.recipe.read_architecture import MOST_EXPERTS, integer, read_architecture
from megatron_btx.recipe.yaml_tree import Node, read_tree, tree_of
from megatron_btx.weights import safe_unpickle
from megatron_btx.weights.mp_rank import content_of, first_file, is_mp_rank
from megatron_btx.weights.read_torch_zip import DAMAGED, MALFORMED, Chunk, StoredArchive
from megatron_btx.weights.torch_dcp import ARGUMENTS, is_torch_dcp
from megatron_btx.weights.torch_dist import read_object

Settings = Mapping[str, Any]
BRIDGE = "run_config.yaml"
"""Megatron-Bridge's configuration."""

_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "seq_length", "max_position_embeddings", "rotary_base", "init_method_std",
    "make_vocab_size_divisible_by", "add_qkv_bias", "qk_layernorm", "layernorm_epsilon",
    "window_size", "window_attn_skip_freq", "seq_len_interpolation_factor", "rope_scaling",
    "rope_scaling_factor", "no_rope_freq", "untie_embeddings_and_output_weights", "softmax_scale",
    "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip
"""Fields of our ``Model`` that are called so."""
_ALIASES = {
    "norm_epsilon": "layernorm_epsilon",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
    "use_rope_scaling": "rope_scaling",
    "scale_factor": "rope_scaling_factor",
    "num_experts": "num_moe_experts",
}
"""Megatron-LM's, or Megatron-Bridge's, word for a field of another name."""
_DROPPED = "--rope-scaling-factor"
"""In place of ``rope_scaling_factor`` where Megatron-LM's arguments say another one than 8: its
``gpt_config_from_args`` (0.17 to 0.19) computes with 8 whatever they say."""
_REQUIRED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_FIXED: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "gated_linear_unit": (True,),
    "add_bias_linear": (False,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "low_freq_factor": (1.0,),
    "high_freq_factor": (4.0,),
    "old_context_len": (8192,),
    "apply_layernorm_1p": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "multi_latent_attention": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": (False,),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_override_pattern": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_num_groups": (None,),
    "moe_router_group_topk": (None,),
    "moe_router_topk_limited_devices": (None,),
    "moe_router_force_biased": (None,),
    "moe_router_quantile_balancing_ema": (0.0, None),
    "moe_apply_probs_on_input": (False,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "squared_relu": (False,),
    "openai_gelu": (False,),
    "quick_geglu": (False,),
    "use_mup": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "heterogeneous_block_specs": (False,),
    "is_hybrid_model": (False,),
}
"""Settings of one value (or a few of one meaning), the only one that we compute."""


def settings_of(directory: Path) -> dict[str, Any] | None:
    """What a directory says of its model in Megatron's words; ``None`` where it says nothing.

    Raises:
        UserError: a file that is damaged, or a pickle that names what no such file needs.
    """
    config = directory / BRIDGE
    if config.is_file():
        return _from_bridge(config)
    found = safe_unpickle.arguments(*_common_of(directory))
    if found is None:
        return None
    if not found.get("group_query_attention", True):
        found["num_query_groups"] = None  # the flag's own default, 1, means something else
    if found.get("use_rope_scaling") and found.get("rope_scaling_factor") not in (None, 8):
        found[_DROPPED] = found.pop("rope_scaling_factor")
    seen, length = found.get("consumed_train_samples"), found.get("seq_length")
    found["tokens"] = seen * length if type(seen) is int and type(length) is int else None
    found["vocab_size"] = _counted(found)
    return found


def _counted(found: Settings) -> Any:
    """``--vocab-size`` as a number of tokens. Of a ``NullTokenizer`` it is one less, without the
    end of a document, up to the release that knows ``--null-tokenizer-eod-id`` (0.16.1 and 0.19.2
    of Megatron-Core's ``null_tokenizer.py``); where that does not fit the padding, it is what
    ``--padded-vocab-size`` was given for."""
    said = found.get("vocab_size")
    if found.get("tokenizer_type") != "NullTokenizer" or "null_tokenizer_eod_id" in found:
        return said
    if type(said) is not int:
        return said
    rows = found.get("padded_vocab_size")
    fits = [n for n in (said + 1, said) if _padding_problem(found, n, rows) is None]
    return fits[0] if fits else said + 1


def _common_of(directory: Path) -> tuple[Any, str]:
    """What Megatron-LM stored once for all ranks, and where: in ``common.pt`` up to 0.18, from 0.19
    on as an object beside the tensors, a list of one; ``None``: nothing."""
    if is_mp_rank(directory):
        file = first_file(directory)
        return content_of(file), str(file)
    path = directory / "common.pt"
    where = str(path)
    if path.is_file():
        header = _header(path, where)
    else:
        key = ARGUMENTS if is_torch_dcp(directory) else "common_state"
        where = f"{directory}: {key}"
        stored = read_object(directory, key)
        if stored is None:
            return None, where
        header = _header(io.BytesIO(stored), where)
    content = safe_unpickle.loads(header, where, safe_unpickle.COMMON_NAMES)
    if isinstance(content, safe_unpickle.StubObject):  # the arguments themselves
        return {"args": content}, where
    return content[0] if isinstance(content, list) and len(content) == 1 else content, where


def _header(file: Path | io.BytesIO, where: str) -> bytes:
    """The pickle in what ``torch.save`` wrote."""
    try:
        with file.open("rb") if isinstance(file, Path) else file as opened:
            size = opened.seek(0, io.SEEK_END)
            archive = StoredArchive(opened, Chunk((), Path(where), 0, size))
            return archive.read("data.pkl", safe_unpickle.LIMIT)
    except (*DAMAGED, *MALFORMED, OSError) as error:
        what = f"not what torch.save writes: {error}"
        raise UserError(where, what, "copy the checkpoint again") from error


def architecture_of(settings: Settings, where: str) -> Architecture:
    """The architecture that settings describe.

    Args:
        settings: in Megatron's words, with ``vocab_size``: the tokenizer's own, without padding.
        where: what errors name.

    Raises:
        UserErrors: everything that is missing, or that we would compute wrongly, at once.
    """
    known = _in_our_words(settings)
    errors = list(_unsupported(known, where))
    entries = {
        "model": {name: known[name] for name in _SAME if known.get(name) is not None},
        "vocab_size": known.get("vocab_size"),
        "moe": _moe_of(known, where, errors),
    }
    found: list[UserError] = []
    described = None
    with collect_errors(found):
        described = read_architecture(_as_written(entries, settings, Path(where)))
    errors += [e for e in found if e.what not in ("is missing", "is empty, not a whole number")]
    if errors or described is None:
        raise UserErrors(errors)
    return described


def _in_our_words(settings: Settings) -> dict[str, Any]:
    known = {_ALIASES.get(name, name): value for name, value in settings.items()}
    shared = known.get("share_embeddings_and_output_weights")
    if shared is not None:
        known["untie_embeddings_and_output_weights"] = (
            not shared if isinstance(shared, bool) else shared  # which is no boolean either
        )
    if "scale_factor" in settings:  # Megatron-Bridge has it for Llama 3.1 only
        known["rope_scaling"] = settings["scale_factor"] is not None
    factor = known.get("rope_scaling_factor")
    is_number = isinstance(factor, int | float) and math.isfinite(factor)  # else it is damaged
    if known.get("rope_scaling") in (None, False) and is_number:
        # Then it scales nothing, and its default is not everybody's.
        del known["rope_scaling_factor"]
    return known


def _unsupported(known: dict[str, Any], where: str) -> Iterator[UserError]:
    """What is missing, and what we would compute wrongly."""
    for name, allowed in _FIXED.items():
        if name in known and known[name] not in allowed:
            what = f"{name} is {known[name]!r}; only {allowed[0]!r} is supported"
            yield UserError(where, what)
    if lacking := [name for name in _REQUIRED if known.get(name) is None]:
        nothing = "has no manifest.json, no arguments of Megatron-LM and no run_config.yaml: it "
        what = nothing if len(lacking) == len(_REQUIRED) else ""
        yield UserError(where, f"{what}does not say {', '.join(lacking)}", _GIVE)
    if known.get("vocab_size") is None:
        what = "does not say vocab_size, the tokenizer's own size without padding"
        yield UserError(where, what, f"give the tokenizer, or {_GIVE}")
    if _DROPPED in known and known.get("rope_scaling_factor") is None:
        what = (
            f"{_DROPPED} was {known[_DROPPED]}, which Megatron-LM of megatron-core 0.17 to 0.19 "
            "drops for 8: was it trained with 8, or with another one set by hand?"
        )
        yield UserError(where, what, _GIVE.replace("it", "`rope_scaling_factor`", 1))
    freq = known.get("moe_layer_freq", 1)
    everywhere = freq == 1 or (isinstance(freq, list) and freq == [1] * len(freq))
    if known.get("num_moe_experts") and not everywhere:
        yield UserError(where, f"moe_layer_freq is {freq!r}; experts must be everywhere")
    balancing = known.get("moe_router_load_balancing_type")
    if "sinkhorn" in (balancing if isinstance(balancing, list) else [balancing]):
        what = "moe_router_load_balancing_type is sinkhorn, whose gates do not sum to one"
        yield UserError(where, what)
    for name in ("window_attn_skip_freq", "no_rope_freq"):
        if isinstance(known.get(name), int):
            what = f"{name} is a number; only a list, a value a layer, is supported"
            yield UserError(where, what)


def _moe_of(known: dict[str, Any], where: str, errors: list[UserError]) -> dict[str, Any] | None:
    given = known.get("num_moe_experts")
    if given in (None, 0):
        return None
    limits = Range(1, MOST_EXPERTS)
    experts = integer(Node(given, Path(where), 0, "num_moe_experts"), limits, errors)
    top = known.get("moe_router_topk")
    routing = {
        "moe_router_topk": 2 if top is None else top,
        "moe_router_pre_softmax": known.get("moe_router_pre_softmax") or False,
    }
    return {"experts": [str(at) for at in range(experts)], "routing": routing} if experts else None


def _as_written(entries: dict[str, Any], settings: Settings, where: Path) -> Node:
    """Each value under the name that the settings have for it."""
    names = {ours: theirs for theirs, ours in _ALIASES.items() if theirs in settings}
    if "share_embeddings_and_output_weights" in settings:
        names["untie_embeddings_and_output_weights"] = "share_embeddings_and_output_weights"

    def named(node: Node, ours: str) -> Node:
        if not isinstance(node.value, dict):
            return replace(node, key=names.get(ours, ours))
        return replace(node, value={name: named(each, name) for name, each in node.value.items()})

    return named(tree_of(entries, where), "")


def refuse_unknown(given: Settings, where: str) -> None:
    """That all that a user says of a model is looked at.

    Raises:
        UserErrors: words that are none of the settings here.
    """
    words = (*_SAME, *_ALIASES, *_FIXED, "vocab_size", "num_moe_experts", "tokens")
    words += ("moe_router_topk", "moe_router_pre_softmax", "moe_layer_freq")
    words += ("share_embeddings_and_output_weights", "padded_vocab_size", "group_query_attention")
    unknown = [name for name in given if name not in words]
    if unknown:
        what = "is no setting of a model here"
        raise UserErrors(
            [UserError(f"{where}: model.{n}", what + near_key(n, words)) for n in unknown[:20]]
        )


_GIVE = (
    "say it under `model:` in a file, and copy the checkpoint with that: btx mix --method copy "
    "--format megatron --config FILE"
)
_SAY_SIZE = _GIVE.replace("it", "the tokenizer's own size (`vocab_size`)", 1)
_TOKENIZERS = (
    "HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"
)  # fmt: skip
"""Kinds whose ``--tokenizer-model`` is a directory or a file that we read too."""


def unsaid(directory: Path) -> set[str]:
    """Settings that a directory which is not ours should have, and has not."""
    found = settings_of(directory)
    if found is None:
        return set()
    known = _in_our_words(found)
    dropped = {"rope_scaling_factor"} if _DROPPED in known else set()
    return dropped | {name for name in ("vocab_size",) if known.get(name) is None}


def check_padding(directory: Path, vocab_size: int) -> None:
    """That a vocabulary of that many tokens, padded as Megatron-LM pads one, has as many rows as
    the checkpoint's arguments say.

    Raises:
        UserError: it has not: it is not the vocabulary that was trained with.
    """
    found = settings_of(directory) or {}
    what = _padding_problem(found, vocab_size, found.get("padded_vocab_size"))
    if what is not None:
        what += f", which a tokenizer of {vocab_size} tokens is not"
        raise UserError(str(directory), what, "give the tokenizer that it was trained with")


def check_own_vocabulary(directory: Path, rows: int | None) -> None:
    """That ``vocab_size`` of Megatron-LM's arguments, padded, has as many rows as they say, and as
    are stored. Megatron-Bridge's is padded by other rules, or not at all.

    Args:
        directory: of a step that is not ours.
        rows: of the embedding as it is stored; ``None``: it is of no shape that has some.

    Raises:
        UserError: it has not: some tokenizers' own size counts, whatever the argument says.
    """
    if (directory / BRIDGE).is_file() or (found := settings_of(directory)) is None:
        return
    own = found.get("vocab_size")
    if type(own) is not int:
        return
    for each in (found.get("padded_vocab_size"), rows):
        # Of equal sizes nothing was padded, as by Megatron-LM's converter of older releases.
        what = _padding_problem(found, own, each) if each != own else None
        if what is not None:
            raise UserError(str(directory), f"{what}, which its vocab_size {own} is not", _SAY_SIZE)


def _padding_problem(settings: Settings, vocab_size: int, rows: object) -> str | None:
    """How a vocabulary was padded, if not from that size; ``None`` also where nothing says it."""
    names = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
    sizes = [n for n in (*map(settings.get, names), rows) if type(n) is int and n > 0]
    if len(sizes) < 3 or settings.get("pad_vocab_size") is False:
        return None
    multiple, tp, padded = sizes
    if -(-vocab_size // (multiple * tp)) * multiple * tp == padded:
        return None
    return f"was padded to {padded} rows by multiples of {multiple} x {tp}"


def tokenizer_named(directory: Path) -> Path | None:
    """The directory of the tokenizer with which Megatron-LM trained a checkpoint, if its arguments
    name one by an absolute path that is on this machine.

    Raises:
        UserError: as :func:`settings_of`.
    """
    found = settings_of(directory) or {}
    named = found.get("tokenizer_model")
    if found.get("tokenizer_type") not in _TOKENIZERS or found.get("special_tokens"):
        return None
    if not isinstance(named, str) or not os.path.isabs(named):
        return None
    path = Path(named)
    if path.is_file() and path.name in ("tokenizer.json", "tokenizer.model"):
        return path.parent
    return path if path.is_dir() else None


def _from_bridge(path: Path) -> dict[str, Any]:
    model = read_tree(path, "Megatron-Bridge's configuration").plain().get("model")
    if not isinstance(model, dict):
        raise UserError(str(path), "has no block `model`", "copy the checkpoint again")
    found = dict(model)
    activation = found.get("activation_func")
    name = activation.get("_target_") if isinstance(activation, dict) else activation
    if name is not None and not str(name).endswith("silu"):
        raise UserError(str(path), f"activation_func is {name}; only silu is supported")
    return found
