"""Bad recipes: keys, values, divisions, layouts."""

from __future__ import annotations

import pytest

from tests.bad import RUN, Bad, Commands, both, change

FINETUNE = "finetune: {tokens: 2048, data: {math: 1, web: 1}"
LAYOUT = FINETUNE + ", layout: "

KEYS = [
    Bad(
        "unknown key",
        change("experts:\n", "colour: red\nexperts:\n"),
        ("recipe.yaml:", "colour", "is not a key", "the keys here are: name, run_dir"),
    ),
    Bad(
        "misspelt key",
        change("hidden_size: 32", "hiden_size: 32"),
        ("recipe.yaml:", "model.hiden_size", "did you mean `hidden_size`?"),
    ),
    Bad(
        "key of another block",
        change("lr: 2e-3", "lr: 2e-3\n  num_layers: 3"),
        ("recipe.yaml:", "training.num_layers", "it belongs in `model.num_layers`"),
    ),
    Bad(
        "misspelt key of Megatron's",
        change(FINETUNE, FINETUNE + ", megatron: {transformer: {recompute_granularty: full}}"),
        ("recipe.yaml:", "recompute_granularty", "recompute_granularity"),
    ),
    Bad(
        "an option of Megatron's for a later stage, which its layers do not follow",
        change(FINETUNE, FINETUNE + ", megatron: {transformer: {moe_permute_fusion: true}}"),
        ("finetune: megatron.transformer.moe_permute_fusion", "True is not supported", "use False"),
        RUN,
    ),
    Bad(
        "misspelt domain in a mixture",
        change("data: {web: 1}", "data: {wab: 1}"),
        ("recipe.yaml:", "seed.data.wab", "there is no domain wab", "did you mean `web`?"),
    ),
    Bad(
        "no YAML",
        change("model:", "model: {"),
        ("recipe.yaml", "YAML"),
    ),
    Bad(
        "no such recipe",
        lambda directory: (directory / "recipe.yaml").unlink(),
        ("recipe.yaml", "there is no such file", "give the path of a recipe"),
    ),
]

VALUES = [
    Bad(
        "text for a number",
        change("num_layers: 2", "num_layers: many"),
        ("recipe.yaml:", "model.num_layers", "'many', not a whole number", "fix: give"),
    ),
    Bad(
        "fraction for a count",
        change("num_layers: 2", "num_layers: 2.5"),
        ("recipe.yaml:", "model.num_layers", "2.5, not a whole number"),
    ),
    Bad(
        "word outside the choice",
        change("precision: fp32", "precision: fp16"),
        ("recipe.yaml:", "precision", "'fp16'", "choose fp32 or bf16"),
    ),
    Bad(
        "list for a block",
        change("seed: {tokens: 6144, data: {web: 1}}", "seed: [1, 2]"),
        ("recipe.yaml:", "seed", "is a list, not a block"),
    ),
    Bad(
        "negative learning rate",
        change("lr: 2e-3", "lr: -1"),
        ("recipe.yaml:", "lr", "out of range", "fix: give"),
    ),
    Bad(
        "no layers",
        change("num_layers: 2", "num_layers: 0"),
        ("recipe.yaml:", "model.num_layers", "is 0, out of range", "give at least 1"),
    ),
]

SLIPS = [
    Bad(
        "a name too long for a directory",
        change("name: small", f"name: {'x' * 300}"),
        ("recipe.yaml:", "name", "cannot name a directory", "100 of them at most"),
        RUN,
    ),
    Bad(
        "a run's directory with a NUL in it",
        change("name: small", 'name: small\nrun_dir: "a\\0b"'),
        ("recipe.yaml:", "run_dir", "has a NUL character", "give another path"),
    ),
    Bad(
        "a variable of a shell",
        change("name: small", "name: small\nrun_dir: $HOME/runs/{name}"),
        ("recipe.yaml:", "run_dir", "$HOME is no variable here", "write the path itself"),
        RUN,
    ),
    Bad(
        "a data file's name too long for a file",
        change("train: data/math.jsonl", f"train: {'x' * 300}"),
        ("recipe.yaml:", "domains.math.train", "too long for a path", "correct the path"),
        RUN,
    ),
    Bad(
        "a base with a NUL in its name",
        change("name: small", 'name: small\nbase: "a\\0b"'),
        ("recipe.yaml:", "base", "has a NUL character"),
    ),
    Bad(
        "more tokens than a float holds",
        change("tokens: 6144", f"tokens: {'9' * 400}"),
        ("recipe.yaml:", "seed.tokens", "(400 characters), out of range", "give at most 1e+18"),
    ),
    Bad(
        "a rate beyond all floats",
        change("lr: 2e-3", f"lr: {'9' * 400}"),
        ("recipe.yaml:", "training.lr", "not a number"),
    ),
    Bad(
        "more layers than memory holds",
        change("num_layers: 2", "num_layers: 1e15"),
        ("recipe.yaml:", "model.num_layers", "out of range", "give at most 10000"),
    ),
    Bad(
        "weights whose sum is none",
        change("data: {web: 1}", "data: {web: 1e308, math: 1e308}"),
        ("recipe.yaml:", "seed.data.web", "is too large", "give shares"),
    ),
    Bad(
        "weights that lose their digits",
        change("data: {web: 1}", "data: {web: 1e-320, math: 1e-320}"),
        ("recipe.yaml:", "seed.data.web", "is too small", "give shares"),
    ),
    Bad(
        "a number that YAML reads as octal",
        change("tokens: 6144", "tokens: 010"),
        ("recipe.yaml:", "seed.tokens", "010 is 8 for YAML 1.1", "write it as a plain number"),
    ),
    Bad(
        "a leading zero before an 8",
        change("tokens: 6144", "tokens: 08192"),
        ("recipe.yaml:", "seed.tokens", "'08192', not a whole number"),
    ),
    Bad(
        "a number that YAML reads by sixties",
        change("tokens: 6144", "tokens: 1:30"),
        ("recipe.yaml:", "seed.tokens", "1:30 is 90 for YAML 1.1", "in quotes if text is meant"),
    ),
]

DIVISIONS = [
    Bad(
        "batch",
        change("global_batch_size: 8", "global_batch_size: 9"),
        ("recipe.yaml:", "global_batch_size", "9 is not divisible", "use a multiple of 4"),
    ),
    Bad(
        "batch by the layout",
        change("{tokens: 6144,", "{tokens: 6144, layout: {data_parallel_size: 3},"),
        ("recipe.yaml:", "global_batch_size", "(4 x 3)", "use a multiple of 12"),
    ),
    Bad(
        "heads",
        change("{tokens: 6144,", "{tokens: 6144, layout: {tensor_model_parallel_size: 8},"),
        ("recipe.yaml:", "seed.layout.tensor_model_parallel_size", "num_attention_heads (4)"),
    ),
    Bad(
        "FFN",
        both(
            change("ffn_hidden_size: 64", "ffn_hidden_size: 63"),
            change("{tokens: 6144,", "{tokens: 6144, layout: {tensor_model_parallel_size: 2},"),
        ),
        ("recipe.yaml:", "seed.layout.tensor_model_parallel_size", "model.ffn_hidden_size (63)"),
    ),
    Bad(
        "experts",
        change(FINETUNE, LAYOUT + "{data_parallel_size: 3, expert_model_parallel_size: 3}"),
        ("recipe.yaml:", "expert_model_parallel_size", "3 does not divide the 2 experts"),
    ),
    Bad(
        "layers",
        change("{tokens: 6144,", "{tokens: 6144, layout: {pipeline_model_parallel_size: 4},"),
        ("recipe.yaml:", "seed.layout.pipeline_model_parallel_size", "model.num_layers (2)"),
    ),
    Bad(
        "expert ranks by the world",
        change(FINETUNE, LAYOUT + "{expert_model_parallel_size: 2}"),
        ("recipe.yaml:", "finetune.layout.expert_model_parallel_size", "does not divide the world"),
    ),
]

LAYOUTS = [
    Bad(
        "computed wrongly: TP without ETP or EP",
        change(
            FINETUNE,
            LAYOUT + "{tensor_model_parallel_size: 2, expert_tensor_parallel_size: 1}",
        ),
        ("recipe.yaml:", "finetune.layout.expert_tensor_parallel_size", "drift", "use 2"),
    ),
    Bad(
        "computed wrongly: experts under TP without sequence parallelism",
        change(FINETUNE, LAYOUT + "{tensor_model_parallel_size: 2, sequence_parallel: false}"),
        ("recipe.yaml:", "finetune.layout.sequence_parallel", "remove it"),
    ),
    Bad(
        "not on gloo: EP with ETP",
        change(
            FINETUNE,
            LAYOUT + "{tensor_model_parallel_size: 2, expert_model_parallel_size: 2, "
            "data_parallel_size: 2}",
        ),
        ("finetune.layout.expert_tensor_parallel_size", "gloo", "set it to 1"),
        RUN,
    ),
    Bad(
        "context parallelism",
        change(FINETUNE, LAYOUT + "{context_parallel_size: 2}"),
        ("finetune.layout.context_parallel_size", "is not supported", "set it to 1"),
    ),
    Bad(
        "more GPUs than there are",
        change(FINETUNE, LAYOUT + "{data_parallel_size: 2, expert_model_parallel_size: 2}"),
        ("finetune.layout", "2 ranks of a GPU each; this machine has 1", "btx stage"),
        RUN,
        {"CUDA_VISIBLE_DEVICES": "0"},
    ),
    Bad(
        "world size too large",
        lambda directory: None,
        ("seed", "1 rank(s), 4 were started", "btx plan"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "4", "RANK": "0"},
    ),
    Bad(
        "world size that is no number",
        lambda directory: None,
        ("WORLD_SIZE", "'four'", "whole number"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "four", "RANK": "0"},
    ),
    Bad(
        "ranks that cannot find each other",
        change(FINETUNE, LAYOUT + "{data_parallel_size: 2, expert_model_parallel_size: 2}"),
        ("MASTER_ADDR", "2 ranks would not find each other", "export MASTER_ADDR"),
        ("stage", "recipe.yaml", "finetune"),
        {"WORLD_SIZE": "2", "RANK": "0"},
    ),
    Bad(
        "local rank that is no number",
        lambda directory: None,
        ("LOCAL_RANK", "'x'", "whole number"),
        ("stage", "recipe.yaml", "seed"),
        {"LOCAL_RANK": "x"},
    ),
    Bad(
        "rank outside the world",
        lambda directory: None,
        ("RANK", "3", "0 to 0"),
        ("stage", "recipe.yaml", "seed"),
        {"WORLD_SIZE": "1", "RANK": "3"},
    ),
]


ALL = [*KEYS, *VALUES, *SLIPS, *DIVISIONS, *LAYOUTS]


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_bad_recipe(bad: Bad, small: Commands) -> None:
    small.refuse(bad)
