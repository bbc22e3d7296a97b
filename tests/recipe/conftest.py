"""A small recipe to break."""

from __future__ import annotations

import pytest

GOOD = """\
name: small
model:
  num_layers: 4
  hidden_size: 32
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  seq_length: 64
tokenizer: {vocab_size: 512}
domains:
  code: {builtin: code}
  math: {train: data/math.jsonl, valid: [data/held.jsonl]}
training:
  global_batch_size: 8
  lr: 1e-3
  layout: {num_threads: 2}
seed: {tokens: 4M, data: {code: 0.5, math: 0.5}}
experts:
  code:
    tokens: 1_000_000
  math: {tokens: 2e6, layout: {data_parallel_size: 2}}
routing: {type: topk, moe_router_topk: 2}
finetune:
  tokens: 1M
  data: {code: 1, math: 1}
  layout: {data_parallel_size: 3}
  global_batch_size: 9
dense: {}
"""


@pytest.fixture
def good() -> str:
    return GOOD
