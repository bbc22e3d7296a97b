"""What Megatron's own layer specs look for in a checkpoint is there, name by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_btx.errors import UserError
from megatron_btx.recipe.schema import Layout
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.source import read_whole
from megatron_btx.weights.torch_dist import TorchDistSource
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.engine.harness import MOE
from tests.ranks import Ranks
from tests.weights.models import moe_plan
from tests.weights.test_directories import manifest

EP2 = Layout(data_parallel_size=2, expert_model_parallel_size=2)
NORM = "decoder.layers.{}pre_mlp_layernorm.weight"
SECOND = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def save_live(directory: Path, layout: Layout) -> None:
    """As our trainer saves it."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model
    from tests.engine.harness import set_weights

    distributed.initialize(layout, 0)
    model = build_model(MOE, layout, "fp32")
    set_weights(model)
    entries = checkpoint.manifest_of(MOE, precision="fp32", layout={})
    checkpoint.save(directory, checkpoint.TrainingState(model=model), entries)


def norms_under_the_local_spec(directory: Path, layout: Layout) -> torch.Tensor:
    """The MoE's norms [layers, hidden] of Megatron's own model of its local spec, which its own
    loader fills; by default that raises where a name is missing."""
    from dataclasses import replace

    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import model_fields, transformer_config
    from megatron_btx.weights.manifest import read_manifest

    distributed.initialize(layout, 0)
    architecture, _ = read_manifest(directory)
    config = replace(transformer_config(architecture, layout, "fp32"), moe_grouped_gemm=False)
    spec = get_gpt_layer_local_spec(len(architecture.experts), False, normalization="RMSNorm")
    model = GPTModel(
        config=config, transformer_layer_spec=spec, pre_process=True, post_process=True,
        **model_fields(architecture),
    )  # fmt: skip
    sharded = model.sharded_state_dict(metadata=checkpoint._metadata())
    loaded = dist_checkpointing.load({"model": sharded}, str(directory))
    model.load_state_dict(loaded["model"])
    return torch.stack([layer.pre_mlp_layernorm.weight for layer in model.decoder.layers]).detach()


@pytest.mark.parametrize("writer", ["a mix on the disk", "our trainer"])
def test_the_local_spec_finds_everything(writer: str, ranks: Ranks, tmp_path: Path) -> None:
    directory = tmp_path / "moe"
    if writer == "our trainer":
        ranks.run(save_live, 2, directory, EP2)
    else:
        plan = moe_plan()
        write_torch_dist(plan, directory, files=lambda: manifest(plan))
    model = open_megatron(directory, "m")
    layers = model.architecture.model.num_layers
    expected = torch.stack([read_whole(model.source, NORM.format(f"{i}.")) for i in range(layers)])
    assert len(expected.unique()) > layers
    for found in ranks.run(norms_under_the_local_spec, 2, directory, EP2):
        assert torch.equal(found, expected)
    # The Transformer Engine spec's names, as its modules of 0.16.1 and 0.19.2 form them.
    stored = TorchDistSource(directory)
    assert {NORM.format(""), SECOND} <= stored.tensors.keys()
    asked = ("self_attention.core_attention", "self_attention.linear_qkv", "pre_mlp_layernorm")
    last = layers - 1
    for module in asked:
        assert f"decoder.layers.{module}._extra_state/shard_{last}_{layers}" in stored.objects
    experts = (
        f"decoder.layers.mlp.experts.experts.linear_fc1._extra_state/shard_{last}.3_{layers}.4"
    )
    assert experts in stored.objects
    common = torch.load(directory / "common.pt")
    assert common["checkpoint_version"] == 3.0


def test_two_norms_under_the_two_names_are_refused(tmp_path: Path) -> None:
    """One under either name is one; what to make of two, nothing says."""
    import pickle

    plan = moe_plan()
    write_torch_dist(plan, tmp_path / "moe", files=lambda: manifest(plan))
    path = tmp_path / "moe" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    other = "decoder.layers.self_attention.linear_qkv.layer_norm_weight"
    for index in [index for index in metadata.storage_data if index.fqn == SECOND]:
        place = next(
            info
            for its, info in metadata.storage_data.items()
            if its.fqn == other and its.offset == index.offset
        )
        metadata.storage_data[index] = place
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="are two norms: the model has one"):
        open_megatron(tmp_path / "moe", "m")
