"""Every way to get a recipe wrong: where the error is, what it says, and that it says it once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.recipe.load import load_recipe, parse_recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"- a\n- b\n", "a list"),
        (b"name: x\n  model: y\n", "2: is not YAML"),
        (b"name: \xff\xfe\n", "not UTF-8"),
        (b"name: a\nname: b\n", "2: name: is set twice (also in line 1)"),
        (b"name: a\non: b\n", 'write "on" in quotes'),
        (b"name: &a [*a]\n", "contains itself"),
        (b'name: "\\UFFFFFFFF"\n', "is not YAML"),
        (b'name: "\\U00110000"\n', "is not YAML"),
        (b"%YAML 1." + b"9" * 5000 + b"\n---\nname: a\n", "is not YAML"),
    ],
)
def test_no_recipe_at_all(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


# What is replaced in the good recipe, by what; the key and the words that the error must have.
BAD = [
    ("hidden_size: 32", "hiden_size: 32", "model.hiden_size", "did you mean `hidden_size`"),
    ("hidden_size: 32", "num_layer: 2", "model.hidden_size", "is missing"),
    ("  lr: 1e-3", "  learning_rate: 1e-3", "training.learning_rate", "did you mean `lr`?"),
    ("  lr: 1e-3", "  seq_len: 64", "training.seq_len", "did you mean `model.seq_length`?"),
    ("  lr: 1e-3", "  max_steps: 5", "training.max_steps", "did you mean `steps`?"),
    ("  lr: 1e-3", "  zzz: 5", "training.zzz", "megatron, from, steps"),
    ("  lr: 1e-3", "  lr: fast", "training.lr", "not a number"),
    ("train: data/math.jsonl", "train: ''", "domains.math.train", "is empty"),
    ("dense: {}", "run_dir: ''", "run_dir", "is empty"),
    ("dense: {}", "wandb: {project: team/llm}", "wandb.project", "which W&B refuses"),
    (
        "  lr: 1e-3",
        "  megatron: {transformer: {attention_dropout: .nan}}",
        "attention_dropout",
        "finite",
    ),
    ("dense: {}", "slurm: {environment: {A: [1, 1e999]}}", "slurm.environment.A", "finite"),
    (
        "experts:",
        "experts:\n  other: {tokens: 64, from: there}",
        "experts.other.data",
        "which domains",
    ),
    ("  lr: 1e-3", "  lr: -1", "training.lr", "out of range"),
    ("  lr: 1e-3", "  min_lr: 1", "training.min_lr", "above lr"),
    ("  lr: 1e-3", "  lr_decay_style: WSD", "training.lr_decay_style", "how many steps"),
    (
        "  lr: 1e-3",
        "  lr_wsd_decay_iters: 3",
        "training.lr_wsd_decay_iters",
        "is of lr_decay_style WSD, and that is cosine",
    ),
    (
        "  lr: 1e-3",
        "  lr_decay_style: WSD\n  lr_wsd_decay_iters: 100000",
        "training.lr_wsd_decay_iters",
        "do not fit into",
    ),
    ("  lr: 1e-3", "  hidden_size: 3", "training.hidden_size", "belongs in `model.hidden_size`"),
    ("  lr: 1e-3", "  precision: fp16", "training.precision", "choose fp32 or bf16"),
    ("  lr: 1e-3", "  tokens: 4X", "training.tokens", "a whole number"),
    ("  lr: 1e-3", "  use_distributed_optimizer: 1", "training.use_distributed", "true or false"),
    ("layout: {num_threads: 2}", "layout: 3", "training.layout", "not a block"),
    ("layout: {num_threads: 2}", "layout: true", "training.layout", "`layout: {}`"),
    ("layout: {num_threads: 2}", "layout: false", "training.layout", "`layout: null`"),
    ("  lr: 1e-3", "  seed: 3", "training.seed", "did you mean `random_seed`, at the top"),
    ("  lr: 1e-3", "  warmup_ratio: 0.1", "training.warmup_ratio", "mean `lr_warmup_iters`?"),
    ("  lr: 1e-3", "  layout: {}", "training.layout", "set twice"),
    ("num_layers: 4", "num_layers: 0", "model.num_layers", "at least 1"),
    ("num_layers: 4", "num_layers: true", "model.num_layers", "is true"),
    ("num_layers: 4", "num_layers: [1, 2]", "model.num_layers", "a list"),
    ("num_query_groups: 2", "num_query_groups: 3", "model.num_query_groups", "1, 2, 4"),
    ("hidden_size: 32", "hidden_size: 33", "model.hidden_size", "not divisible"),
    ("num_query_groups: 2", "window_size: 7", "model.window_size", "write [n, 0]"),
    ("num_query_groups: 2", "window_size: [7, 1]", "model.window_size", "write [n, 0]"),
    ("num_query_groups: 2", "window_size: [a, 0]", "model.window_size", "not a whole number"),
    ("num_query_groups: 2", "window_attn_skip_freq: [1]", "model.window_attn", "no window"),
    ("num_query_groups: 2", "moe_ffn_hidden_size: 32", "model.moe_ffn", "not mixed here"),
    ("type: topk", "type: soft, moe_router_pre_softmax: true", "routing.moe", "has no meaning"),
    ("builtin: code", "builtin: cod", "domains.code.builtin", "did you mean code?"),
    ("{builtin: code}", "{}", "domains.code", "has no text"),
    ("  code: {builtin: code}", "  mean: {builtin: code}", "domains.mean", "choose another name"),
    ("  code: {builtin: code}", "  a/b: {builtin: code}", "domains.a/b", "cannot name"),
    ("{code: 0.5,", "{cod: 0.5,", "seed.data.cod", "did you mean `code`"),
    ("{code: 0.5, math: 0.5}", "{code: 0, math: 0}", "seed.data", "every weight is zero"),
    ("{code: 0.5,", "{code: -1,", "seed.data.code", "negative"),
    ("seed: {tokens: 4M,", "seed: {", "seed.tokens", "nothing to branch from"),
    ("  math: {tokens: 2e6", "  mth: {tokens: 2e6", "experts.mth.data", "did you mean `math`"),
    ("experts:\n  code:", "experts:\n  seed:", "experts.seed", "include_seed"),
    ("moe_router_topk: 2", "moe_router_topk: 4", "routing.moe_router_topk", "at most 3"),
    ("moe_router_topk: 2", "moe_router_topk: 1", "routing.moe_router_topk", "never learn"),
    ("type: topk", "type: sample_top1", "export.format", "format: none"),
    ("global_batch_size: 9", "global_batch_size: 8", "finetune.global_batch_size", "multiple of 3"),
    ("dense: {}", "dense: {tokens: 5}", "dense.tokens", "is derived"),
    ("dense: {}", "dense: {data: {code: 1}}", "dense.data", "is derived"),
    ("dense: {}", "evaluate: {tokens: 5}", "evaluate.tokens", "one sequence"),
    ("dense: {}", "mix: {average: {code: 1, math: 1}}", "mix.average", "gives seed no weight"),
    ("dense: {}", "mix: {average: {cod: 1}}", "mix.average.cod", "did you mean `code`"),
    ("dense: {}", "mix: {average_groups: {norm: {code: 1}}}", "mix.average_groups.norm", "`norms`"),
    (
        "dense: {}",
        "mix: {average_groups: {head: {code: 1}}}",
        "mix.average_groups.head",
        "no weight",
    ),
    ("dense: {}", "mix: {noise: 0.1}", "mix.noise", "use method upcycle"),
    ("dense: {}", "mix: {num_chunks: 2}", "mix.num_chunks", "use method split or upcycle"),
    ("dense: {}", "mix: {method: split, num_chunks: 7}", "mix.num_chunks", "into 7 parts"),
    ("dense: {}", "mix: {dare: 0.5, include_seed: false}", "mix.dare", "set include_seed"),
    ("dense: {}", "mix: {dare: 1.0}", "mix.dare", "out of range"),
    ("dense: {}", "mix: {centroids: x}", "mix.centroids", "router_init"),
    ("dense: {}", "mix: {method: split, num_chunks: 2, scale: cube_root}", "mix.scale", "down"),
    ("dense: {}", "mix: {average: even}", "mix.average", "uniform, tokens or a mapping"),
    ("dense: {}", "tokenizers: {}", "tokenizers", "did you mean `tokenizer`"),
    ("tokenizer: {", "tokenizer: {type: huggingface, ", "tokenizer.path", "is missing"),
    # Layouts.
    ("num_threads: 2", "tensor_model_parallel_size: 3", "tensor_model_parallel_size", "heads (4)"),
    ("num_threads: 2", "pipeline_model_parallel_size: 3", "pipeline_model", "num_layers (4)"),
    ("num_threads: 2", "expert_model_parallel_size: 3", "training.layout.expert", "dense model"),
    ("size: 3}", "size: 3, expert_model_parallel_size: 2}", "finetune.layout.expert", "3 experts"),
    (
        "{data_parallel_size: 3}",
        "{tensor_model_parallel_size: 2, data_parallel_size: 3, expert_tensor_parallel_size: 1}",
        "finetune.layout.expert_tensor_parallel_size",
        "drift apart",
    ),
    (
        "{data_parallel_size: 3}",
        "{data_parallel_size: 1, expert_model_parallel_size: 3}",
        "finetune.layout.expert_model_parallel_size",
        "does not divide the world size (1",
    ),
    (
        "{data_parallel_size: 3}",
        "{data_parallel_size: 3, sequence_parallel: true}",
        "finetune.layout.sequence_parallel",
        "without tensor parallelism",
    ),
    (
        "{data_parallel_size: 3}",
        "{data_parallel_size: 3, tensor_model_parallel_size: 2, sequence_parallel: false}",
        "finetune.layout.sequence_parallel",
        "only with it",
    ),
    ("seq_length: 64", "seq_length: 63", "layout.tensor_model", "multiple of 2"),
    ("vocab_size: 512", "vocab_size: 515", "tensor_model", "padded vocabulary"),
    ("ffn_hidden_size: 64", "ffn_hidden_size: 63", "tensor_model", "ffn_hidden_size (63)"),
    # Megatron's own fields.
    (
        "  lr: 1e-3",
        "  megatron: {transformer: {recompute_granularty: full}}",
        "training.megatron.transformer.recompute_granularty",
        "did you mean `recompute_granularity`",
    ),
    (
        "  lr: 1e-3",
        "  megatron: {transformer: {hidden_size: 5}}",
        "training.megatron.transformer.hidden_size",
        "`model.hidden_size`",
    ),
    ("  lr: 1e-3", "  megatron: {ddp: {bucket_size: x}}", "ddp.bucket_size", "Optional[int]"),
    ("  lr: 1e-3", "  megatron: {optimizer: {lr: 1}}", "optimizer.lr", "set `lr`"),
    ("  lr: 1e-3", "  megatron: {optimizer: {fn: 1}}", "optimizer.fn", "not a field"),
    ("  lr: 1e-3", "  megatron: {optim: {lr: 1}}", "megatron.optim", "did you mean `optimizer`"),
    (
        "  lr: 1e-3",
        "  megatron: {transformer: {normalization: LayerNorm}}",
        "transformer.normalization",
        "remove it",
    ),
    ("  lr: 1e-3", "  megatron: {transformer: {init_method: x}}", "init_method", "YAML cannot"),
]


# Some only matter under tensor parallelism.
TP2 = {"seq_length: 63", "vocab_size: 515", "ffn_hidden_size: 63"}


@pytest.mark.parametrize(("old", "new", "key", "words"), BAD, ids=[row[1][:60] for row in BAD])
def test_bad_recipes(good: str, old: str, new: str, key: str, words: str) -> None:
    text = good.replace(old, new, 1)
    assert text != good
    if new in TP2:
        text = text.replace("{num_threads: 2}", "{tensor_model_parallel_size: 2}")
        text = text.replace("  seq_length", "  make_vocab_size_divisible_by: 5\n  seq_length")
    with pytest.raises(UserError) as caught:
        parse_recipe(text, "recipe.yaml")
    errors = caught.value.errors if isinstance(caught.value, UserErrors) else [caught.value]
    matching = [
        error for error in errors if error.where.startswith("recipe.yaml:") and key in error.where
    ]
    assert any(words in str(error) for error in matching), str(caught.value)
    for error in errors:
        assert error.fix, f"no fix: {error}"


def test_the_line_is_that_of_the_mistake(good: str) -> None:
    with pytest.raises(UserErrors) as caught:
        parse_recipe(good.replace("builtin: code", "builtin: cod"), "here.yaml")
    line = good.splitlines().index("  code: {builtin: code}") + 1
    assert caught.value.errors[0].where == f"here.yaml:{line}: domains.code.builtin"


def test_all_problems_at_once_and_each_once(good: str) -> None:
    text = good.replace("hidden_size: 32", "hidden_size: 33")
    text = text.replace("{code: 0.5,", "{cod: 0.5,").replace("  lr: 1e-3", "  lrr: 3")
    with pytest.raises(UserErrors) as caught:
        parse_recipe(text)
    places = [error.where.rpartition(": ")[2] for error in caught.value.errors]
    assert places == ["model.hidden_size", "training.lrr", "seed.data.cod"]


def test_what_several_stages_inherit_is_told_once(good: str) -> None:
    """Of each key of `training:` one error, not one a stage."""
    with pytest.raises(UserErrors) as caught:
        parse_recipe(good.replace("  lr: 1e-3", "  nonsense: 1\n  layers: 3"), "recipe.yaml")
    assert len(caught.value.errors) == 2


def test_an_expert_says_what_it_is_trained_on(good: str) -> None:
    """Forgotten tokens would make it a copy of the seed; 0 is written by who means one."""
    for nothing in ("tokens: null", "lr: 1e-4"):
        with pytest.raises(UserErrors, match=r"experts.code.tokens: is missing") as caught:
            parse_recipe(good.replace("tokens: 1_000_000", nothing), "recipe.yaml")
        assert "`tokens: 0` is a copy of the seed" in str(caught.value)
    steps = parse_recipe(good.replace("tokens: 1_000_000", "steps: 3"), "recipe.yaml")
    assert steps.experts["code"].tokens > 0


def test_a_dotted_key_goes_under_its_block(good: str) -> None:
    with pytest.raises(
        UserErrors, match=r"write it under its block: `mix: \{router_init: \.\.\.\}`"
    ):
        parse_recipe(f"{good}mix.router_init: zeros\n", "recipe.yaml")
