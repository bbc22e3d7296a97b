"""Mixtures as what everybody loads: the family that computes them, or none and why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.families import family_of, open_hf
from megatron_btx.families.export import export_hf, write_hf
from megatron_btx.mix.btx import btx
from megatron_btx.recipe.schema import Routing
from tests.engine.harness import DENSE, MOE
from tests.engine.test_layouts import TP2_EP2
from tests.families.made import make
from tests.families.ranks_side import save_moe

transformers = pytest.importorskip("transformers")

ROOMY = {"moe_expert_capacity_factor": 4.0}  # no token is dropped
BEST = Routing(type="sample_top1", greedy=True, first_layer_soft=False)
CASES = {
    "topk": (Routing(), {}, "Mixtral", 2),
    "soft": (Routing(type="soft"), {}, "Mixtral", 4),
    "sliding window": (Routing(), {"window_size": (5, 0)}, "Mixtral", 2),
    "best one": (BEST, {}, "Mixtral", 1),
    "of Qwen2": (Routing(), {"add_qkv_bias": True}, "Qwen2Moe", 2),
    "of Qwen3": (Routing(), {"qk_layernorm": True}, "Qwen3Moe", 2),
    "not normalised": (Routing(moe_router_pre_softmax=True), {}, "Qwen2Moe", 2),
    "switch": (Routing(type="switch", **ROOMY), {}, "Qwen2Moe", 1),
    "switch of Qwen3": (Routing(type="switch", **ROOMY), {"qk_layernorm": True}, "Qwen3Moe", 1),
}


@pytest.mark.parametrize("name", CASES)
def test_an_exported_moe_computes_megatrons_logits(ranks, tmp_path, name):
    """Megatron, TP2 x EP2 -> torch_dist -> Hugging Face -> transformers."""
    routing, fields, family, k = CASES[name]
    tokens = torch.randint(0, 120, (2, 16), generator=torch.Generator().manual_seed(1))
    want, *_ = ranks.run(save_moe, 2, tmp_path / "moe", TP2_EP2, routing, tokens, fields)
    export_hf(tmp_path / "moe", tmp_path / "hf", bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model) is getattr(transformers, f"{family}ForCausalLM")
    assert model.config.num_experts_per_tok == k
    assert model.generation_config.eos_token_id == 2
    with torch.no_grad():
        got = model(tokens).logits
    assert (got - want).abs().max() < 1e-4
    assert open_hf(tmp_path / "hf", "again").architecture.experts == MOE.experts


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama 3.1", "Mixtral"),
        ("mistral", "Mixtral"),
        ("qwen2, some windows", "Qwen2Moe"),
        ("qwen3", "Qwen3Moe"),
        ("phi3", "Mixtral"),
        ("granite", "GraniteMoe"),
    ],
)
def test_a_mix_of_equal_models_is_that_model(tmp_path, name, family):
    """Equal experts under gates that sum to one; the shared expert of zeros adds nothing."""
    dense = make(name, tmp_path / "in")
    models = [open_hf(tmp_path / "in", label) for label in ("a", "b", "c")]
    plan = btx(models, routing=Routing(), dtype=torch.float32)
    write_hf(plan, tmp_path / "moe")
    moe = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    assert type(moe) is getattr(transformers, f"{family}ForCausalLM")
    tokens = torch.randint(0, 70, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(moe(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=0)


BOTH = {"add_qkv_bias": True, "qk_layernorm": True}


@pytest.mark.parametrize(
    ("routing", "fields", "reason"),
    [
        (Routing(type="sample_top1"), {}, "draws its expert at random"),
        (Routing(type="sample_top1", greedy=True), {}, "first layer routes softly"),
        (Routing(), BOTH, "as qwen2_moe qk_layernorm would be False, not True"),
        (None, BOTH, "as qwen3 add_qkv_bias would be False, not True"),
        (Routing(), {"no_rope_freq": (0, 1)}, "as mixtral no_rope_freq would be None, not (0, 1)"),
    ],
)
def test_what_no_family_computes_is_refused(routing, fields, reason):
    architecture = DENSE if routing is None else replace(MOE, routing=routing)
    architecture = replace(architecture, model=replace(architecture.model, **fields))
    with pytest.raises(UserError, match="no Hugging Face family computes this") as caught:
        family_of(architecture)
    assert reason in str(caught.value)
