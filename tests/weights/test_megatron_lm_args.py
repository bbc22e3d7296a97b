"""Checkpoints of Megatron-LM and Megatron-Bridge: what they say of their model, and no more."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pickle
import signal
import zipfile
from dataclasses import asdict, replace
from random import Random

import pytest
import torch
import yaml
from megatron.core.enums import ModelType
from megatron.core.transformer.enums import AttnBackend

from megatron_btx.errors import UserError
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe import megatron_fields
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights import megatron_lm_args
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.megatron_lm_args import architecture_of, settings_of
from megatron_btx.weights.source import read_whole
from megatron_btx.weights.write_torch_dist import write_torch_dist
from tests.mix.commands import btx
from tests.weights.models import DENSE, dense, moe_plan

ARGS = {
    **asdict(DENSE.model),
    "norm_epsilon": 1e-5,
    "group_query_attention": True,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "use_rope_scaling": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "vocab_size": 100,
    "padded_vocab_size": 128,
    "params_dtype": torch.bfloat16,
    "attention_backend": AttnBackend.auto,
    "model_type": ModelType.encoder_or_decoder,
    "exit_signal": signal.SIGTERM,
    "num_experts": None,
    "consumed_train_samples": 1000,
}


def megatron_lm(path, args, plan=None) -> None:
    """What Megatron-LM leaves: our tensors under Megatron's keys, its arguments in common.pt."""
    write_torch_dist(plan or copy(dense("a", 1), dtype=torch.float32), path)
    content = {"args": args, "checkpoint_version": 3.0, "iteration": 7, "small": torch.ones(2)}
    torch.save(content, path / "common.pt")
    (path / "hashes.json").unlink()  # it writes none


def test_arguments_of_megatron_lm(tmp_path):
    megatron_lm(tmp_path / "iter", argparse.Namespace(**ARGS))
    model = open_megatron(tmp_path / "iter", "m")
    assert model.architecture == DENSE
    assert model.manifest["tokens"] == 1000 * DENSE.model.seq_length
    name = "decoder.layers.3.mlp.linear_fc2.weight"
    assert torch.equal(read_whole(model.source, name), read_whole(dense("a", 1).source, name))


def test_a_factor_counts_where_rope_is_scaled(tmp_path):
    """Megatron-LM's arguments have one (8) always, and its argument path drops any other."""
    megatron_lm(tmp_path / "off", argparse.Namespace(**(ARGS | {"rope_scaling_factor": 32.0})))
    assert open_megatron(tmp_path / "off", "m").architecture == DENSE
    for factor in (8.0, 32.0):
        scaled = ARGS | {"use_rope_scaling": True, "rope_scaling_factor": factor}
        megatron_lm(tmp_path / str(factor), argparse.Namespace(**scaled))
    found = open_megatron(tmp_path / "8.0", "m").architecture.model
    assert (found.rope_scaling, found.rope_scaling_factor) == (True, 8.0)
    with pytest.raises(UserError, match="drops for 8: was it trained with 8, or with another"):
        open_megatron(tmp_path / "32.0", "m")
    given = {"rope_scaling_factor": 32.0}
    found = open_megatron(tmp_path / "32.0", "m", given).architecture.model
    assert (found.rope_scaling, found.rope_scaling_factor) == (True, 32.0)


def test_experts_of_megatron_lm_are_mixed_and_verified(tmp_path):
    for label in ("code", "seed"):
        args = argparse.Namespace(**(ARGS | {"vocab_size": None}))
        megatron_lm(tmp_path / label, args)
    config = tmp_path / "mix.yaml"
    config.write_text("model: {vocab_size: 100}")
    sources = [tmp_path / "code", tmp_path / "seed"]
    words = ["--config", config, "--average", "tokens", "--out", tmp_path / "out"]
    assert btx("mix", "--sources", *sources, *words)[0] == 0
    assert btx("verify", tmp_path / "out")[0] == 0


def test_an_moe_of_megatron_lm(tmp_path):
    moe = {"num_experts": 4, "moe_router_topk": 2, "moe_layer_freq": [1] * 4}
    megatron_lm(tmp_path / "iter", argparse.Namespace(**(ARGS | moe)), moe_plan())
    found = open_megatron(tmp_path / "iter", "m").architecture
    assert found == replace(DENSE, experts=("0", "1", "2", "3"), routing=Routing())


def test_what_the_arguments_leave_out_is_given(tmp_path):
    unsaid = ARGS | {"vocab_size": None, "group_query_attention": False, "num_query_groups": 1}
    megatron_lm(tmp_path / "iter", argparse.Namespace(**unsaid))
    with pytest.raises(UserError, match="does not say vocab_size"):
        open_megatron(tmp_path / "iter", "m")
    given = {"vocab_size": 100, "group_query_attention": True, "num_query_groups": 2}
    assert open_megatron(tmp_path / "iter", "m", given).architecture == DENSE


PADDED = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1}
NULL = PADDED | {"tokenizer_type": "NullTokenizer"}


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({"vocab_size": 128, "padded_vocab_size": 256}, 129),
        ({"vocab_size": 128, "padded_vocab_size": 128}, 128),  # as --padded-vocab-size says
        ({"vocab_size": 100, "padded_vocab_size": 128}, 101),
        ({"vocab_size": 128, "padded_vocab_size": 128, "null_tokenizer_eod_id": None}, 128),
        ({"vocab_size": 100, "padded_vocab_size": 128, "null_tokenizer_eod_id": 0}, 100),
        ({"vocab_size": None, "padded_vocab_size": 128}, None),
    ],
)
def test_a_null_tokenizer_s_end_of_a_document_counts(args, size, tmp_path):
    """Megatron-Core's own class says how many tokens that are: of this release, or of the other."""
    torch.save({"args": argparse.Namespace(**NULL, **args)}, tmp_path / "common.pt")
    assert settings_of(tmp_path)["vocab_size"] == size
    library = importlib.import_module("megatron.core.tokenizers.text.libraries.null_tokenizer")
    known = "eod_id" in inspect.signature(library.NullTokenizer).parameters
    if size not in (None, args["padded_vocab_size"]) and known == ("null_tokenizer_eod_id" in args):
        assert library.NullTokenizer(args["vocab_size"]).vocab_size == size


def test_a_vocabulary_of_its_own_arguments_fits_their_padding(tmp_path):
    args = ARGS | PADDED | {"tokenizer_type": "HuggingFaceTokenizer"}
    for own, padded in ((100, 256), (300, 128)):
        wrong = argparse.Namespace(**(args | {"vocab_size": own, "padded_vocab_size": padded}))
        megatron_lm(tmp_path / str(own), wrong)
        with pytest.raises(UserError, match=f"padded to {padded} rows .* vocab_size {own} is not"):
            open_megatron(tmp_path / str(own), "m")
    fitting = args | {"vocab_size": 200, "padded_vocab_size": 256}
    megatron_lm(tmp_path / "stored", argparse.Namespace(**fitting))  # 128 rows
    with pytest.raises(UserError, match="padded to 128 rows by multiples of 128 x 1, which its"):
        open_megatron(tmp_path / "stored", "m")
    assert open_megatron(tmp_path / "100", "m", {"vocab_size": 100}).architecture.vocab_size == 100
    # Not padded at all, whatever the multiples say.
    plain = {"vocab_size": 128, "padded_vocab_size": 128, "tensor_model_parallel_size": 8}
    megatron_lm(tmp_path / "plain", argparse.Namespace(**(args | plain)))
    assert open_megatron(tmp_path / "plain", "m").architecture.vocab_size == 128


def flipped(content, at, bits):
    made = bytearray(content)
    made[at] ^= bits
    return bytes(made)


def test_a_damaged_common_file_is_one_error(tmp_path):
    """Bytes of its directory and of headers turned over; and a bomb, which nobody unpacks."""
    torch.save({"args": argparse.Namespace(**ARGS)}, tmp_path / "common.pt")
    content = (tmp_path / "common.pt").read_bytes()
    central = content.index(b"PK\1\2")
    random = Random(1)
    places = [*range(30), *range(central, central + 46), len(content) - 1]
    places += [random.randrange(len(content)) for _ in range(60)]
    read, refused = 0, list[str]()
    for at in places:
        (tmp_path / "common.pt").write_bytes(flipped(content, at, 1 << random.randrange(8)))
        try:
            settings_of(tmp_path)
            read += 1  # a byte that nobody looks at
        except UserError as error:
            refused.append(error.where)
    assert read > 0
    assert len(refused) > 50
    assert set(refused) == {str(tmp_path / "common.pt")}
    with zipfile.ZipFile(tmp_path / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 24))
    with pytest.raises(UserError, match="data.pkl is compressed"):
        settings_of(tmp_path)


def test_models_that_we_would_compute_wrongly_are_refused_at_once(tmp_path):
    wrong = {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "rotary_percent": 0.5,
        "multi_latent_attention": True,
        "hidden_size": None,
    }
    megatron_lm(tmp_path / "iter", argparse.Namespace(**(ARGS | wrong)))
    with pytest.raises(UserError) as caught:
        open_megatron(tmp_path / "iter", "m")
    for name in wrong:
        assert name in str(caught.value)


OTHERS = {
    "moe_apply_probs_on_input": True,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_router_group_topk": 2,
    "moe_mlp_glu_interleave_size": 32,
    "squared_relu": True,
    "use_mup": True,
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 4,
    "is_hybrid_model": True,
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_of_the_same_tensors_is_refused(name):
    """All of these are stored under the names and shapes of ours, and compute something else."""
    settings = ARGS | {"num_experts": 4, "moe_router_load_balancing_type": ["aux_loss"]}
    assert architecture_of(settings, "iter").experts
    with pytest.raises(UserError, match=f"{name} is "):
        architecture_of(settings | {name: OTHERS[name]}, "iter")


def test_scale_of_scores_and_layers_without_rotary_positions():
    said = {"softmax_scale": 0.1, "no_rope_freq": [0, 0, 0, 1]}
    found = architecture_of(ARGS | said, "iter").model
    assert (found.softmax_scale, found.no_rope_freq) == (0.1, (0, 0, 0, 1))
    with pytest.raises(UserError, match="no_rope_freq is a number"):
        architecture_of(ARGS | {"no_rope_freq": 4}, "iter")


def test_what_a_recipe_may_not_set_is_looked_at_here_too():
    """A field that a recipe may not set makes another model, and then it is looked at here, or is
    one of training alone, and stands here."""
    trained = (
        "calculate_per_token_loss", "optimizer", "perform_initialization",
        "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout", "virtual_pipeline_model_parallel_size",
        "microbatch_group_size_per_vp_stage",
    )  # fmt: skip
    looked_at = {*megatron_lm_args._FIXED, *megatron_lm_args._SAME, "moe_layer_freq", *trained}
    assert megatron_fields._FIXED.keys() <= looked_at


class Evil:
    """What an attacker would leave in a pickle."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_malicious_common_file_is_refused_and_not_run(tmp_path):
    megatron_lm(tmp_path / "iter", Evil(tmp_path / "owned"))
    with pytest.raises(UserError, match="which no checkpoint needs: refused"):
        open_megatron(tmp_path / "iter", "m")
    assert not (tmp_path / "owned").exists()
    for content in (b"text", pickle.dumps({"args": 1})):
        (tmp_path / "iter" / "common.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"common\.pt: not what torch.save writes"):
            open_megatron(tmp_path / "iter", "m")


def test_the_configuration_of_megatron_bridge(tmp_path):
    write_torch_dist(copy(dense("a", 1), dtype=torch.float32), tmp_path / "iter")
    model = {name: value for name, value in asdict(DENSE.model).items() if "untie" not in name}
    model |= {
        "_target_": "megatron.bridge.models.llama.llama_provider.LlamaModelProvider",
        "share_embeddings_and_output_weights": False,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "vocab_size": 100,
        "num_moe_experts": None,
    }
    path = tmp_path / "iter" / "run_config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "train": {"train_iters": 3}}))
    assert open_megatron(tmp_path / "iter", "m").architecture == DENSE
    stretched = {"scale_factor": 8.0, "low_freq_factor": 1.0, "old_context_len": 8192}
    path.write_text(yaml.safe_dump({"model": model | stretched}))
    found = open_megatron(tmp_path / "iter", "m").architecture
    assert found.model == replace(DENSE.model, rope_scaling=True, rope_scaling_factor=8.0)
    model["activation_func"]["_target_"] = "torch.nn.functional.gelu"
    for content, words in (
        (yaml.safe_dump({"model": model}), "activation_func is torch.nn.functional.gelu"),
        ("model: [", "not YAML"),
        ("train: {}", "has no block `model`"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            open_megatron(tmp_path / "iter", "m")


def test_a_directory_that_says_nothing(tmp_path):
    write_torch_dist(copy(dense("a", 1), dtype=torch.float32), tmp_path / "iter")
    with pytest.raises(UserError, match="no arguments of Megatron-LM"):
        open_megatron(tmp_path / "iter", "m")
    given = {**asdict(DENSE.model), "vocab_size": 100}
    assert open_megatron(tmp_path / "iter", "m", given).architecture == DENSE
