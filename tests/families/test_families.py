"""Every family with real ``transformers`` models: in and out bit for bit, and the same logits."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_btx.families import open_hf
from megatron_btx.families.family import computed
from megatron_btx.mix import offline
from megatron_btx.mix.request import MixRequest
from megatron_btx.recipe import count, memory
from megatron_btx.recipe.schema import Layout
from tests.engine.test_layouts import EP2, TP2_PP2_EP2
from tests.families.made import CONFIGS, SHAPE, make
from tests.families.ranks_side import changed_logits, logits, losses

transformers = pytest.importorskip("transformers")

MIXTURES = [name for name in CONFIGS if "mixtral" in name or "moe" in name]
TP2_PP2 = Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
LENGTH = 24
"""More than three times the sliding window."""


def convert(source: Path, out: Path, form: Any, **options: Any) -> Path:
    """What the two tools do."""
    request = MixRequest(
        sources=(f"model={source}",), out=str(out), method="copy", format=form, **options
    )
    offline.run(request, io.StringIO())
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A model of a name, its directory as Megatron's, and that as Hugging Face's; made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            place = tmp_path_factory.mktemp("model")
            model = make(name, place / "in")
            convert(place / "in", place / "megatron", "megatron")
            convert(place / "megatron", place / "out", "hf")
            made[name] = (model, place)
        return made[name]

    return get


def batch() -> tuple[Tensor, Tensor]:
    """Tokens [3, S], and which of them are real: one row is padded on the right."""
    tokens = torch.randint(0, 70, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(tokens)
    real[1, 10:] = 0
    return tokens, real


def theirs(model: Any) -> Tensor:
    """What ``transformers`` computes for :func:`batch`."""
    tokens, real = batch()
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=real).logits


def distance(ours: Tensor | None, want: Tensor) -> float:
    """Largest difference over the real tokens."""
    assert ours is not None
    return float((ours - want)[batch()[1].bool()].abs().max())


def the_same_model(original: Any, place: Path) -> Any:
    """What ``transformers`` reads from ``place/out``: that it is ``original``, and by our own
    reading what lies in ``place/in``."""
    again = transformers.AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    assert type(again) is type(original)
    want, got = original.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert torch.equal(got[key], tensor), key
    assert torch.equal(theirs(again), theirs(original))
    opened = [open_hf(place / end, "model").architecture for end in ("in", "out")]
    assert computed(opened[0]) == computed(opened[1])
    return again


@pytest.mark.parametrize("name", CONFIGS)
def test_in_and_out_is_the_same_model(converted, name):
    original, place = converted(name)
    again = the_same_model(original, place)
    for key in (*SHAPE, "rope_parameters", "sliding_window", "layer_types", "norm_topk_prob"):
        if hasattr(original.config, key):
            assert getattr(again.config, key) == getattr(original.config, key), key


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted(converted, name):
    original, place = converted(name)
    counted = count.parameters(open_hf(place / "in", "model").architecture)
    assert counted.total_true_vocab == sum(p.numel() for p in original.parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["qwen2", "qwen2 moe"])
def test_half_precision_and_many_files(tmp_path, name, dtype):
    original = make(name, tmp_path / "in", offline.DTYPES[dtype])
    original.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    convert(tmp_path / "in", tmp_path / "megatron", "megatron", shard="20KB")
    convert(tmp_path / "megatron", tmp_path / "out", "hf", shard="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype is offline.DTYPES[dtype]
    for key, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_names_are_read_and_written(converted, tmp_path, name):
    original, place = converted(name)
    fused = convert(place / "megatron", tmp_path / "fused", "hf", fused=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32)
    for key, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    convert(fused, tmp_path / "back", "hf")
    files = [d / "model.safetensors" for d in (place / "out", tmp_path / "back")]
    assert files[0].read_bytes() == files[1].read_bytes()


LAYOUTS = {"one rank": Layout(), "TP2 x PP2": TP2_PP2}
MOE_LAYOUTS = {"one rank": Layout(), "TP2 x PP2 x EP2": TP2_PP2_EP2, "EP2": EP2}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, one) for name in CONFIGS for one in (MOE_LAYOUTS if name in MIXTURES else LAYOUTS)],
)
def test_megatron_computes_the_same_logits(ranks, converted, name, layout):
    """fp32, 1e-4: sums in another order differ by about 1e-6 here."""
    chosen = (LAYOUTS | MOE_LAYOUTS)[layout]
    model, place = converted(name)
    found = ranks.run(logits, chosen.world_size, place / "megatron", chosen, batch()[0])
    want = theirs(model)
    on_last_stage = [each for each, _ in found if each is not None]
    assert len(on_last_stage) == chosen.world_size // chosen.pipeline_model_parallel_size
    for each in on_last_stage:
        assert distance(each, want) < 1e-4
    architecture = open_hf(place / "in", "model").architecture
    stages = range(chosen.pipeline_model_parallel_size)
    counted = [sum(memory.rank_parameters(architecture, chosen, stage)) for stage in stages]
    assert {parameters for _, parameters in found} == set(counted)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor_model_parallel_size=2)])
def test_padding_of_the_vocabulary_takes_no_probability(ranks, converted, layout):
    """70 tokens, 128 rows: under TP2 the second rank has 6 of the tokens."""
    model, place = converted("qwen2")
    tokens, _ = batch()
    labels = tokens.roll(-1, 1)
    found = ranks.run(losses, layout.world_size, place / "megatron", layout, tokens, labels)
    with torch.no_grad():
        want = torch.nn.functional.cross_entropy(
            model(tokens).logits.transpose(1, 2), labels, reduction="none"
        )
    for each in found:
        torch.testing.assert_close(each, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama 3.1", [{"rope_scaling": False}, {"rope_scaling_factor": 32.0}]),
        ("llama, linear", [{"seq_len_interpolation_factor": None}, {"rotary_base": 5e5}]),
        ("mistral", [{"window_size": None}, {"window_size": (7, 0)}]),
        ("qwen2, some windows", [{"window_attn_skip_freq": None}]),
        ("qwen3", [{"layernorm_epsilon": 1e-3}]),
        ("smollm3", [{"no_rope_freq": None}, {"no_rope_freq": (0, 0, 1, 0)}]),
        (
            "granite",
            [
                {"softmax_scale": None},
                {"embedding_multiplier": 1.0},
                {"residual_multiplier": 1.0},
                {"logits_scaling": 1.0},
            ],
        ),
    ],
)
def test_a_wrong_constant_would_be_seen(ranks, converted, name, changes):
    model, place = converted(name)
    want = theirs(model)
    found = ranks.run(changed_logits, 1, place / "megatron", batch()[0], [{}, *changes])[0]
    assert distance(found[0], want) < 1e-4
    for each, change in zip(found[1:], changes, strict=True):
        assert distance(each, want) > 5e-4, change


def test_the_config_is_read_in_the_form_of_transformers_4(tmp_path):
    """``rope_theta`` and ``rope_scaling`` at the top, as the released models have them."""
    make("llama 3.1", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    new = open_hf(tmp_path, "model").architecture
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    path.write_text(json.dumps(config))
    assert open_hf(tmp_path, "model").architecture == new
    assert new.model.rope_scaling
    assert replace(new.model, rope_scaling=False).rotary_base == 5e5
