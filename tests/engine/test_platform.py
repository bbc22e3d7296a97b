"""What is used on which machine, for every combination of what may be installed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_btx.engine.platform import Platform, detect
from megatron_btx.errors import UserError
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Layout, Model

TE, APEX, TORCH = "transformer_engine", "apex", "torch"
USED = {  # (CUDA, Transformer Engine, Apex): (layers, optimizer)
    (False, False, False): (TORCH, TORCH),
    (False, False, True): (TORCH, TORCH),
    (False, True, False): (TORCH, TORCH),
    (False, True, True): (TORCH, TORCH),
    (True, False, False): (TORCH, TORCH),
    (True, False, True): (TORCH, APEX),
    (True, True, False): (TE, TE),
    (True, True, True): (TE, TE),
}


def test_every_combination() -> None:
    assert set(USED) == set(itertools.product((False, True), repeat=3))
    for (cuda, transformer_engine, apex), expected in USED.items():
        platform = Platform(cuda=cuda, transformer_engine=transformer_engine, apex=apex)
        assert (platform.layers, platform.optimizer) == expected, platform


@pytest.mark.parametrize("there", itertools.product((False, True), repeat=3))
def test_context_parallelism_is_refused_whatever_is_there(
    there: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Transformer Engine too: a rank's batch is the whole sequence, not its part of it."""
    from megatron_btx.engine import model

    cuda, engine, apex = there
    machine = Platform(cuda=cuda, transformer_engine=engine, apex=apex)
    monkeypatch.setattr(model.platform, "detect", lambda: machine)
    shape = Model(num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4)
    architecture = Architecture(model=shape, vocab_size=100)
    with pytest.raises(UserError, match=r"layout\.context_parallel_size: is 2: context"):
        model.transformer_config(architecture, Layout(context_parallel_size=2), "fp32")


def test_this_machine_trains_with_torch_where_it_has_no_gpu() -> None:
    if not detect().cuda:
        assert (detect().layers, detect().optimizer) == (TORCH, TORCH)


def test_layers_without_transformer_engine_are_the_same_with_and_without_cuda() -> None:
    from megatron_btx.engine.moe.experts import GroupedExperts
    from megatron_btx.engine.ops.attention import ScaledDotProductAttention
    from megatron_btx.engine.ops.norm import RMSNorm
    from megatron_btx.engine.spec import layer_spec
    from megatron_btx.recipe.schema import Routing

    for cuda, apex in itertools.product((False, True), repeat=2):
        platform = Platform(cuda=cuda, transformer_engine=False, apex=apex)
        layer = layer_spec(Routing(), machine=platform).submodules
        assert layer.input_layernorm is RMSNorm
        assert layer.self_attention.submodules.core_attention is ScaledDotProductAttention
        assert layer.mlp.submodules.experts is GroupedExperts


@pytest.mark.parametrize(
    "modules", [("__init__",), ("__init__", "optimizers")], ids=["bare", "with optimizers"]
)
def test_a_foreign_apex_is_warned_of_and_ignored(tmp_path: Path, modules: tuple[str, ...]) -> None:
    (tmp_path / "apex").mkdir()
    for module in modules:
        (tmp_path / "apex" / f"{module}.py").write_text("")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code = "from megatron_btx.engine.platform import detect; print(detect().apex)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout.strip() == "False"
    assert "not NVIDIA's Apex" in done.stderr


def test_gradients_are_accumulated_without_apex_whoever_makes_the_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron's layers ask for Apex's kernel, the output layer under Transformer Engine too."""
    from megatron.core.tensor_parallel import layers

    from megatron_btx.engine import mcore_patches

    for cuda, transformer_engine in ((False, False), (True, False), (True, True)):
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
        monkeypatch.delattr(layers, "fused_weight_gradient_mlp_cuda", raising=False)
        mcore_patches.install.__wrapped__(
            Platform(cuda=cuda, transformer_engine=transformer_engine, apex=False)
        )
        assert layers._grad_accum_fusion_available
        assert layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32
