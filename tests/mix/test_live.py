"""The mix inside a job: any source layout into any target layout, the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_btx.engine.simulated_ranks import held
from megatron_btx.mix.btx import btx
from megatron_btx.mix.reference.rules import nearest
from megatron_btx.recipe.schema import Layout, Training
from megatron_btx.weights.megatron import open_megatron
from tests.engine.harness import assemble, named_tensor
from tests.engine.test_layouts import EP2, EP4, PP2, TP2, TP2_EP2, TP2_ETP2, TP2_PP2_EP2
from tests.mix.ranks_side import ROUTING, mix_live, save_dense

DP4_EP2 = Layout(data_parallel_size=4, expert_model_parallel_size=2)
SOURCES = {"code": TP2, "math": PP2, "prose": Layout(), "seed": TP2}
TARGETS = {
    "one rank": Layout(),
    "tp2-etp2": TP2_ETP2,
    "pp2": PP2,
    "ep2": EP2,
    "ep4": EP4,
    "dp4-ep2": DP4_EP2,
    "tp2-ep2": TP2_EP2,
    "tp2-pp2-ep2": TP2_PP2_EP2,
}


@pytest.fixture(scope="module")
def sources(ranks, tmp_path_factory):
    """Four dense checkpoints, each written under a layout of its own, one with its optimizer."""
    root = tmp_path_factory.mktemp("sources")
    for label, layout in SOURCES.items():
        args = (root / label, label, layout, "fp32", label == "code", False)
        ranks.run(save_dense, layout.world_size, *args)
    return {label: root / label for label in SOURCES}


@pytest.mark.parametrize("name", TARGETS)
def test_every_layout_gets_the_same_bits(ranks, sources, name):
    layout = TARGETS[name]
    results = ranks.run(mix_live, layout.world_size, sources, layout, "fp32")
    mixed = assemble([result[0] for result in results])
    check(mixed, torch.float32)
    for _, read, nbytes in results:
        assert set(read) == set(SOURCES)
        # Averages read every source once for each byte made; experts one source.
        assert sum(read.values()) <= len(SOURCES) * nbytes
    assert [{**dict.fromkeys(SOURCES, 0), **one} for one in counted(sources, layout)] == [
        read for _, read, _ in results
    ]
    if layout.data_parallel_size == layout.world_size > 1:
        # However many ranks hold it: what is averaged is read once, and each expert once.
        total = {label: sum(result[1][label] for result in results) for label in SOURCES}
        average, ffn = _bytes()
        assert total == {label: average + ffn for label in SOURCES}
        assert all(sum(result[1].values()) for result in results), "shared out"


def counted(sources, layout):
    """What each rank would read, by the ranks that btx plan --ranks builds."""
    models = [open_megatron(directory, label) for label, directory in sources.items()]
    plan = btx(models, routing=ROUTING, dtype=torch.float32)
    training = Training(layout=layout, precision="fp32")
    ranks = range(layout.world_size)
    return [held(plan.architecture, training, number, plan).read() for number in ranks]


def test_bf16_is_rounded_once(ranks, sources):
    results = ranks.run(mix_live, 2, sources, EP2, "bf16")
    check(assemble([result[0] for result in results]), torch.bfloat16)


def test_tied_embeddings(ranks, sources, tmp_path):
    ranks.run(save_dense, 2, tmp_path / "tied", "tied", TP2, "bf16", False, True)
    results = ranks.run(mix_live, 2, {"a": tmp_path / "tied", "b": tmp_path / "tied"}, TP2, "bf16")
    mixed = assemble([result[0] for result in results])
    assert "output_layer.weight" not in mixed
    embedding = named_tensor("tied/embedding.word_embeddings.weight", (128, 32)).bfloat16().float()
    assert np.array_equal(mixed["embedding.word_embeddings.weight"][:120], embedding[:120])


def test_canonical_names_whatever_wrote_it(sources):
    for label, directory in sources.items():
        model = open_megatron(directory, label)
        fc1 = named_tensor(f"{label}/decoder.layers.mlp.linear_fc1.weight", (2, 96, 32))
        got = model.source.read("decoder.layers.1.mlp.linear_fc1.weight", ((40, 60), (3, 7)))
        assert torch.equal(got, fc1[1, 40:60, 3:7])


def check(mixed: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Against plain loops over the tensors that the sources were filled with."""
    assert len(mixed) == 10
    for name, values in mixed.items():
        if "router" in name:
            assert 0.4 < values.std() < 0.6
            assert not np.array_equal(values[0], values[1])
            continue
        if ".experts.experts." in name:
            dense = name.replace(".experts.experts.", ".")
            each = [named_tensor(f"{label}/{dense}", values[:, 0].shape) for label in SOURCES]
            want = torch.stack(each, dim=1)
        else:
            dense = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            each = [named_tensor(f"{label}/{dense}", values.shape) for label in SOURCES]
            want = sum(one.double() for one in each) / len(each)
        if "embedding" in name or "output_layer" in name:
            assert not values[120:].any()
            want, values = want[:120], values[:120]
        assert np.array_equal(values, nearest(want, dtype).float().numpy()), name


def _bytes() -> tuple[int, int]:
    """Bytes of one dense model: all that is averaged, all FFNs."""
    layers, hidden, ffn, vocabulary, qkv = 2, 32, 48, 120, 64
    norms = (2 * layers + 1) * hidden
    attention = layers * (qkv * hidden + hidden * hidden)
    return 4 * (norms + attention + 2 * vocabulary * hidden), 4 * layers * 3 * hidden * ffn
