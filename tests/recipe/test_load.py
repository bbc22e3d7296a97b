"""Reading recipes: values, inheritance, and every way to get one wrong."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.pipeline import graph
from megatron_btx.recipe import load, run_plan
from megatron_btx.recipe.load import digest, dump, dump_kept, load_recipe, parse_recipe
from megatron_btx.recipe.schema import Layout, Training


def test_values(good: str, tmp_path: Path) -> None:
    recipe = parse_recipe(good, tmp_path / "recipe.yaml")
    assert recipe.run_dir == str(tmp_path / "runs/small")
    assert recipe.seed.tokens == 4_000_000
    assert recipe.experts["math"].tokens == 2_000_000
    assert recipe.seed.lr == 1e-3
    assert recipe.domains["math"].train == (str(tmp_path / "data/math.jsonl"),)
    assert recipe.domains["math"].valid == (str(tmp_path / "data/held.jsonl"),)
    assert recipe.experts["code"].data == {"code": 1.0}
    assert recipe.model_names == ("code", "math", "seed")


def test_training_is_inherited_key_by_key(good: str) -> None:
    recipe = parse_recipe(good)
    assert recipe.dense is not None
    assert recipe.seed.layout == Layout(num_threads=2)
    assert recipe.experts["math"].layout == Layout(num_threads=2, data_parallel_size=2)
    assert recipe.finetune.global_batch_size == 9
    assert recipe.finetune.lr == recipe.dense.lr == 1e-3
    assert recipe.seed.adam_beta2 == Training().adam_beta2


def test_null_is_the_default(good: str) -> None:
    """Of a number, a choice and a list; of ``steps`` and ``tokens``, what the other says."""
    empty = "  lr: null\n  steps: null\n  lr_decay_style: null\n  freeze: null"
    text = good.replace("  lr: 1e-3", empty)
    recipe = parse_recipe(f"{text}\nmix: {{average: null}}\n")
    assert recipe.seed.lr == Training().lr
    assert recipe.seed.lr_decay_style == Training().lr_decay_style
    assert recipe.seed.freeze == ()
    assert recipe.mix.average == "uniform"
    assert recipe.seed.tokens == 4_000_000
    other = parse_recipe(good.replace("tokens: 2e6", "tokens: null, steps: 3"))
    assert other.experts["math"].tokens == 3 * 8 * 64


def test_dense_tokens_are_those_of_experts_and_finetune(good: str) -> None:
    recipe = parse_recipe(good)
    assert recipe.dense is not None
    step, finetune_step = 8 * 64, 9 * 64
    experts = -(-1_000_000 // step) + -(-2_000_000 // step)
    assert recipe.dense.tokens == experts * step + -(-1_000_000 // finetune_step) * finetune_step


def test_round_trip(good: str) -> None:
    recipe = parse_recipe(good)
    again = parse_recipe(dump(recipe))
    assert again == recipe
    assert digest(again) == digest(recipe)
    kept = parse_recipe(dump_kept(recipe, Path("runs/small")), "/elsewhere/recipe.yaml")
    assert kept == replace(recipe, run_dir=str(Path("runs/small").absolute()))


def test_digest_is_of_the_content(good: str) -> None:
    recipe = parse_recipe(good)
    other = parse_recipe(good.replace("tokens: 2e6", "tokens: 2_000_000"))
    changed = parse_recipe(good.replace("tokens: 2e6", "tokens: 3e6"))
    assert digest(recipe.experts["math"]) == digest(other.experts["math"])
    assert digest(recipe.experts["math"]) != digest(changed.experts["math"])
    assert digest(recipe.experts["code"]) == digest(changed.experts["code"])
    assert digest({"a": 1, "b": 2}) != digest({"b": 2, "a": 1})


def test_base(good: str, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "base.yaml").write_text(good)
    child = tmp_path / "child.yaml"
    child.write_text(
        "base: up/base.yaml\nname: child\nexperts: {math: {tokens: 5M}}\n"
        "seed: {data: {code: 1}}\ndense: null\ntraining: {layout: {num_threads: 1}}\n"
    )
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert recipe.dense is None
    assert list(recipe.experts) == ["code", "math"]
    assert recipe.experts["math"].tokens == 5_000_000
    assert recipe.experts["math"].layout.data_parallel_size == 2
    assert recipe.experts["math"].layout.num_threads == 1
    assert recipe.seed.data == {"code": 1.0}, "a mixture is one value"
    assert recipe.domains["math"].train == (str(tmp_path / "up/data/math.jsonl"),)


def test_an_empty_training_block_forgets_that_of_the_base(good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good)
    (tmp_path / "child.yaml").write_text("base: base.yaml\nname: child\ntraining:\n")
    assert load_recipe(tmp_path / "base.yaml").seed.lr == 1e-3
    assert load_recipe(tmp_path / "child.yaml").seed.lr == Training().lr


def test_home_in_a_base(good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "base.yaml").write_text(good)
    (tmp_path / "child.yaml").write_text("base: ~/base.yaml\nname: child\n")
    assert load_recipe(tmp_path / "child.yaml").name == "child"


def test_text_that_looks_like_a_number_stays_text(good: str) -> None:
    """A run's kept recipe says the same as the one that it was begun with."""
    text = f"{good}slurm: {{environment: {{A: '1e5', B: '12e45678', C: '1_0e3', D: x, E: 1e5}}}}\n"
    recipe = parse_recipe(text)
    given = {"A": "1e5", "B": "12e45678", "C": "1_0e3", "D": "x", "E": 1e5}
    assert parse_recipe(dump(recipe)).slurm.environment == recipe.slurm.environment == given


def test_what_a_recipe_says_otherwise(good: str) -> None:
    other = good.replace("tokens: 2e6", "tokens: 3e6").replace("name: small", "run_dir: x\nname: b")
    changed = load.changes(parse_recipe(good), parse_recipe(other + "mix: {ties: 0.5}\n"))
    assert changed[0] == "name: small -> b"
    assert "experts.math.tokens: 2000000 -> 3000000" in changed
    assert "mix.ties: nothing -> 0.5" in changed
    assert not any("run_dir" in one or "seed" in one for one in changed)
    assert load.changes(parse_recipe(good), parse_recipe(good)) == []


def test_names_that_are_no_utf8_have_a_hash() -> None:
    """Python's text for the bytes of a file's name."""
    assert digest(["caf\udce9"]) != digest(["caf\u00e9"])


def test_base_that_starts_from_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(UserError, match="starts from this recipe"):
        load_recipe(tmp_path / "a.yaml")


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


def test_experts_without_tokens_are_sparse_upcycling(good: str) -> None:
    text = good.replace("tokens: 1_000_000", "tokens: 0").replace("tokens: 2e6", "tokens: 0")
    recipe = parse_recipe(text)
    assert [expert.tokens for expert in recipe.experts.values()] == [0, 0]


def test_the_room_loads_no_torch() -> None:
    code = (
        "import sys; from megatron_btx.recipe import check, check_layout, count, load; "
        "from megatron_btx.recipe import megatron_fields, memory, run_plan; "
        "assert megatron_fields.fields('transformer'); "
        "print(sorted({'torch', 'numpy', 'megatron.core'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_steps_say_tokens(good: str, tmp_path: Path) -> None:
    """The same recipe, the same keys of its stages."""
    text = good.replace("tokens: 2e6, layout", "steps: 3907, layout")
    recipe, same = parse_recipe(text), parse_recipe(good.replace("2e6", str(3907 * 8 * 64)))
    assert recipe.experts["math"].tokens == 3907 * 8 * 64
    assert recipe == same
    assert [s.key for s in graph.build(recipe)] == [s.key for s in graph.build(same)]
    both = good.replace("tokens: 2e6,", "tokens: 2e6, steps: 5,")
    with pytest.raises(UserErrors, match=r"experts\.math\.steps: stands beside `tokens`"):
        parse_recipe(both)
    with pytest.raises(UserErrors, match=r"steps: is 0, out of range"):
        parse_recipe(good.replace("tokens: 2e6,", "steps: 0,"))
    with pytest.raises(UserErrors, match=r"dense\.steps: is derived"):
        parse_recipe(good.replace("dense: {}", "dense: {steps: 3}"))
    (tmp_path / "base.yaml").write_text(good)
    over = tmp_path / "over.yaml"
    over.write_text("base: base.yaml\nseed: {steps: 7}\ntraining: {steps: 9}\n")
    over_it = load_recipe(over)
    assert over_it.seed.tokens == 7 * 8 * 64
    assert over_it.experts["math"].tokens == 2_000_000, "a stage's own tokens are above training"


def test_a_run_lies_beside_its_recipe_wherever_btx_is_started(
    good: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one that an earlier release began from the current directory goes on, with a hint."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for place in (here, elsewhere):
        place.mkdir()
    (here / "recipe.yaml").write_text(good + "share: [runs/other*]\n")
    monkeypatch.chdir(elsewhere)
    found = load_recipe(here / "recipe.yaml")
    assert found.run_dir == str(here / "runs/small")
    assert found.share == (str(here / "runs/other*"),)
    assert load_recipe("../here/recipe.yaml").run_dir == "../here/runs/small"
    assert capsys.readouterr().err == ""
    (elsewhere / "runs" / "small").mkdir(parents=True)
    (elsewhere / "runs" / "other_1").mkdir()
    found = load_recipe(here / "recipe.yaml")
    assert (found.run_dir, found.share) == ("runs/small", ("runs/other*",))
    assert "run_dir: runs/small is taken from the current directory" in capsys.readouterr().err
    (here / "runs" / "small").mkdir(parents=True)
    assert load_recipe(here / "recipe.yaml").run_dir == str(here / "runs/small")


def test_a_run_dir_stands_from_the_file_that_names_it(good: str, tmp_path: Path) -> None:
    (tmp_path / "over").mkdir()
    (tmp_path / "base.yaml").write_text(good + "run_dir: made/{name}\n")
    over = tmp_path / "over" / "recipe.yaml"
    over.write_text("base: ../base.yaml\nname: other\n")
    assert load_recipe(over).run_dir == str(tmp_path / "made" / "other")
    over.write_text("base: ../base.yaml\nrun_dir: /some/where\n")
    assert load_recipe(over).run_dir == "/some/where"


def test_a_stage_that_ends_in_its_warm_up_is_warned_of(good: str) -> None:
    recipe = parse_recipe(good.replace("tokens: 2e6,", "tokens: 500,"))
    assert list(run_plan.warnings(recipe)) == [
        "experts.math: 1 step under a warm-up of 100: the learning rate never reaches its peak; "
        "give more `tokens`, or lower `lr_warmup_iters`"
    ]
    assert not list(run_plan.warnings(parse_recipe(good)))


KEYS = {
    "systems/btm_top1": "5a27ff99ef966e3c",
    "ablations/btx_soft": "7dd7fc9ff492c3ad",
    "demo/recipe": "2607841baad91d62",  # of its routers from centroids
    "paper_7b/recipe": "e8ae68d5b1fafd9b",
}


@pytest.mark.parametrize("name", KEYS)
def test_content_keys_of_the_examples_stay_what_they_are(name: str) -> None:
    """A run begun with an earlier version goes on: renamed keys and new fields change no hash."""
    recipe = load_recipe(Path(__file__).parents[2] / "examples" / f"{name}.yaml")
    keys = [(s.name, s.key) for s in graph.build(recipe) if s.name != "mix"]
    assert digest(keys)[:16] == KEYS[name]


def test_the_former_name_of_the_method(good: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = good + "system: btm\nmix: {method: btx}\n"
    old = parse_recipe(base + "btm: {select: top1}\n")
    new = parse_recipe(base + "btm: {method: top1}\n")
    assert old == new
    assert "btm.select is called `method` now" in capsys.readouterr().err
    assert "method: top1" in dump(old)
    assert [s.key for s in graph.build(old)] == [s.key for s in graph.build(new)]


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


def test_what_a_base_has_is_left_out_by_null(good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good)
    fewer = tmp_path / "fewer.yaml"
    fewer.write_text("base: base.yaml\nexperts: {math: null}\n")
    assert list(load_recipe(fewer).experts) == ["code"]
    fewer.write_text("base: base.yaml\nexperts: {law: null}\n")  # which none has
    with pytest.raises(UserErrors, match=r"experts.law.tokens: is missing"):
        load_recipe(fewer)


def test_a_dotted_key_goes_under_its_block(good: str) -> None:
    with pytest.raises(
        UserErrors, match=r"write it under its block: `mix: \{router_init: \.\.\.\}`"
    ):
        parse_recipe(f"{good}mix.router_init: zeros\n", "recipe.yaml")


def test_a_run_is_where_its_directory_lies(good: str, tmp_path: Path) -> None:
    """Moved or copied, its kept recipe still says where it was."""
    made = tmp_path / "made"
    made.mkdir()
    (made / "recipe.yaml").write_text(f"{good}run_dir: {made}\n")
    (made / "lock").touch()
    assert load_recipe(made / "recipe.yaml").run_dir == str(made)
    (tmp_path / "link").symlink_to(made)
    assert load_recipe(tmp_path / "link" / "recipe.yaml").run_dir == str(made)
    shutil.copytree(made, tmp_path / "copy")
    assert load_recipe(tmp_path / "copy" / "recipe.yaml").run_dir == str(tmp_path / "copy")
    made.rename(tmp_path / "moved")
    assert load_recipe(tmp_path / "moved" / "recipe.yaml").run_dir == str(tmp_path / "moved")
    (tmp_path / "moved" / "lock").unlink()  # a recipe of that name that no run has written
    assert load_recipe(tmp_path / "moved" / "recipe.yaml").run_dir == str(made)
