"""What runs again after a change: the table of docs/changing.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_btx.pipeline import graph
from megatron_btx.recipe.load import parse_recipe

RECIPE = """
name: a
model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, seq_length: 64}
tokenizer: {vocab_size: 512}
domains:
  general: {train: general.jsonl, valid: general.valid.jsonl}
  code: {train: code.jsonl, valid: code.valid.jsonl}
  math: {train: math.jsonl, valid: math.valid.jsonl}
seed: {tokens: 64k, data: {general: 1}}
experts:
  code: {tokens: 64k, data: {code: 0.95, general: 0.05}}
  math: {tokens: 64k, data: {math: 0.95, general: 0.05}}
finetune: {tokens: 64k, data: {code: 0.4, math: 0.4, general: 0.2}}
"""
MORE = "  law: {train: law.jsonl, valid: law.valid.jsonl}\nseed:"
MOE = ["mix", "finetune", "evaluate", "export", "report"]
EXPERTS = ["expert:code", "expert:math"]
CHANGES: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "finetune": ([("finetune: {", "finetune: {lr: 1e-3, ")], MOE),
    "routing": ([("seed:", "routing: {type: switch}\nseed:")], MOE),
    "mix": ([("seed:", "mix: {router_init: centroids}\nseed:")], MOE),
    "an expert": ([("code: {tokens: 64k", "code: {lr: 1e-3, tokens: 64k")], ["expert:code", *MOE]),
    "an expert more": (
        [("seed:", MORE), ("finetune:", "  law: {tokens: 64k, data: {law: 1}}\nfinetune:")],
        ["prepare", "expert:law", *MOE],
    ),
    "an expert less": ([("  math: {tokens: 64k, data: {math: 0.95, general: 0.05}}\n", "")], MOE),
    "dense": ([("seed:", "dense: {}\nseed:")], ["dense", "evaluate", "report"]),
    "evaluate": ([("seed:", "evaluate: {tokens: 4096}\nseed:")], ["evaluate", "report"]),
    "layouts": ([("seed:", "training: {layout: {data_parallel_size: 2}}\nseed:")], []),
    "saves": ([("seed:", "training: {save_interval: 7}\nseed:")], []),
    "the seed": ([("seed: {tokens: 64k", "seed: {tokens: 128k")], ["seed", *EXPERTS, *MOE]),
    "the model": ([("size: 64", "size: 96")], ["seed", *EXPERTS, *MOE]),
    "random_seed": ([("name: a", "name: a\nrandom_seed: 2")], ["prepare", "seed", *EXPERTS, *MOE]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_runs_again(change: str, tmp_path: Path) -> None:
    for domain in ("general", "code", "math", "law"):
        for split in ("", ".valid"):
            line = json.dumps({"text": f"{domain}{split} and some words"})
            (tmp_path / f"{domain}{split}.jsonl").write_text(f"{line}\n")

    def keys(text: str) -> dict[str, str]:
        stages = graph.build(parse_recipe(text, tmp_path / "recipe.yaml"))
        return {stage.name: stage.key for stage in stages}

    edits, again = CHANGES[change]
    text = RECIPE
    for old, new in edits:
        assert text.count(old) >= 1
        text = text.replace(old, new, 1)
    before, after = keys(RECIPE), keys(text)
    assert [name for name, key in after.items() if before.get(name) != key] == again
