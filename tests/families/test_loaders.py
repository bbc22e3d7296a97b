"""Names of tensors that vLLM and SGLang take of an MoE, and those that we write: the same ones.

Facts from their sources, whose loaders skip or refuse any other name. vLLM 0.32.0:
``vllm/model_executor/models/{mixtral,qwen2_moe,qwen3_moe}.py``, as at its commits f0e26957c6af,
8bbabf03350e and 002456df36fc too. SGLang 0.5.23: ``python/sglang/srt/models/`` and the same names;
experts in ``FusedMoE.make_expert_params_mapping``. Both map q, k, v and gate, up to stacked
parameters of theirs, and ``experts.N.PART.`` to one for all experts.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from megatron_btx.families import open_hf
from megatron_btx.families.hf import FAMILIES, to_hf
from megatron_btx.mix.one_model import copy
from tests.families.made import CONFIGS, make

pytest.importorskip("transformers")

LAYER = r"model\.layers\.\d+\."
COMMON = {
    r"model\.embed_tokens\.weight",
    r"model\.norm\.weight",
    r"lm_head\.weight",
    LAYER + r"input_layernorm\.weight",
    LAYER + r"post_attention_layernorm\.weight",
    *(LAYER + rf"self_attn\.{part}_proj\.weight" for part in "qkvo"),
}
QWEN = {
    LAYER + r"mlp\.gate\.weight",
    *(LAYER + rf"mlp\.experts\.\d+\.{part}_proj\.weight" for part in ("gate", "up", "down")),
}
BIASES = {LAYER + rf"self_attn\.{part}_proj\.bias" for part in "qkv"}
"""vLLM's Qwen2-MoE has them always, SGLang's where ``qkv_bias`` says so."""
TAKEN = {
    "mixtral": COMMON
    | {LAYER + r"block_sparse_moe\.gate\.weight"}
    | {LAYER + rf"block_sparse_moe\.experts\.\d+\.{part}\.weight" for part in ("w1", "w2", "w3")},
    "qwen2_moe": COMMON
    | BIASES
    | QWEN
    | {LAYER + r"mlp\.shared_expert_gate\.weight"}
    | {LAYER + rf"mlp\.shared_expert\.{part}_proj\.weight" for part in ("gate", "up", "down")},
    "qwen3_moe": COMMON | QWEN | {LAYER + rf"self_attn\.{part}_norm\.weight" for part in "qk"},
}


MODELS = ("Mixtral", "Qwen2Moe", "Qwen3Moe")


@pytest.mark.parametrize("name", [name for name, (kind, _) in CONFIGS.items() if kind in MODELS])
def test_every_name_is_taken_and_every_parameter_has_one(tmp_path: Path, name: str) -> None:
    make(name, tmp_path)
    model = open_hf(tmp_path, "model")
    family = FAMILIES[model.manifest["model_type"]]
    names = to_hf(copy(model, dtype=torch.float32), family).targets
    taken = TAKEN[family.model_type] - (BIASES if name == "qwen2 moe, no bias" else set())
    met = {each: [one for one in taken if re.fullmatch(one, each)] for each in names}
    assert not [each for each, patterns in met.items() if len(patterns) != 1]
    assert {pattern for patterns in met.values() for pattern in patterns} == taken
