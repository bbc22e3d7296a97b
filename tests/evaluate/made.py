"""What the tests evaluate."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_btx.data.tokenizer import SentencePiece, train_tokenizer
from megatron_btx.families.export import write_hf
from megatron_btx.mix.btx import btx
from megatron_btx.mix.one_model import copy
from megatron_btx.mix.router_init import RouterInit
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.names import canonical_tensors
from megatron_btx.recipe.schema import Model, Routing
from megatron_btx.weights.directory import as_json
from megatron_btx.weights.file_hashes import HASHES
from megatron_btx.weights.manifest import FORMAT, MANIFEST
from megatron_btx.weights.plan import Checkpoint, Plan
from megatron_btx.weights.source import MemorySource
from megatron_btx.weights.write_torch_dist import write_torch_dist

VOCABULARY = 420
WIDE = 440
"""Hidden size of a bigram model: a direction of its own for every token."""

TOP2 = Routing()
SWITCH = Routing(type="switch", moe_expert_capacity_factor=0.5)
"""Drops half of the tokens in training."""

CHAINS = [("Q: how many? A:", " #### 7"), ("def seven():\n", "    return 7")]
"""After the last token of the one comes the other, then the end."""


def _texts(words: list[str], many: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(many)]


TEXTS = {
    "x": _texts(["loop", "return", "value", "index", "array", "print"], 12, 1),
    "y": _texts(["river", "forest", "winter", "morning", "value", "bird"], 12, 2),
}


@functools.cache
def tokenizer() -> SentencePiece:
    """Of all the text here."""
    lines = [text for texts in TEXTS.values() for text in texts]
    lines += [prompt + answer for prompt, answer in CHAINS for _ in range(40)]
    return train_tokenizer(lines, VOCABULARY, where="test")


def random_model(
    tokenizer: SentencePiece, seed: int, *, seq_length: int = 32, vocab_size: int | None = None
) -> Checkpoint:
    """Two layers of random weights, as good as any for comparing numbers."""
    model = Model(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=seq_length,
        make_vocab_size_divisible_by=64,
    )
    architecture = Architecture(model=model, vocab_size=vocab_size or tokenizer.vocab_size)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in canonical_tensors(architecture).items():
        values = torch.randn(shape, generator=draw)
        tensors[name] = 1 + 0.1 * values if "norm" in name else 0.3 * values
    return Checkpoint("model", None, architecture, MemorySource(tensors))


def bigram_model(tokenizer: SentencePiece, chains: list[tuple[str, str]]) -> Checkpoint:
    """One layer that adds nothing: the logits are a table's row of the last token. Along the chains
    the next token has logit 30, everything else 0; without chains every token is as likely."""
    model = Model(
        num_layers=1,
        hidden_size=WIDE,
        ffn_hidden_size=16,
        num_attention_heads=2,
        seq_length=192,
        make_vocab_size_divisible_by=64,
        layernorm_epsilon=1e-12,
    )
    architecture = Architecture(model=model, vocab_size=tokenizer.vocab_size)
    shapes = canonical_tensors(architecture)
    tensors = {
        name: torch.ones(shape) if "norm" in name else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    tensors["embedding.word_embeddings.weight"] = torch.eye(tokenizer.vocab_size, WIDE)
    head = tensors["output_layer.weight"]
    for last, token in table(tokenizer, chains).items():
        head[token, last] = 30 / WIDE**0.5  # RMSNorm makes a one sqrt(WIDE)
    return Checkpoint("model", None, architecture, MemorySource(tensors))


def table(tokenizer: SentencePiece, chains: list[tuple[str, str]]) -> dict[int, int]:
    """Token -> the next one."""
    found: dict[int, int] = {}
    for prompt, answer in chains:
        before, after = (row.tolist() for row in tokenizer.encode([prompt, answer]))
        ids = [before[-1], *after, tokenizer.eos_id]
        for last, token in zip(ids, ids[1:], strict=False):
            assert found.setdefault(last, token) == token, "the chains cross"
    return found


def moe(tokenizer: SentencePiece, routing: Routing = TOP2, names: str = "abcd") -> Plan:
    """Random models mixed, four by default."""
    models = [random_model(tokenizer, seed) for seed in range(len(names))]
    named = [
        Checkpoint(n, None, m.architecture, m.source) for n, m in zip(names, models, strict=True)
    ]
    return btx(named, routing=routing, dtype=torch.float32, router=RouterInit("normal", 0.5, 5))


def write(model: Checkpoint | Plan, path: Path, tokenizer: SentencePiece) -> None:
    """As a Hugging Face directory with its tokenizer."""
    plan = model if isinstance(model, Plan) else copy(model, dtype=torch.float32)
    write_hf(plan, path)
    tokenizer.save(path / "tokenizer")


def with_nan(path: Path) -> None:
    """One number of a Hugging Face model's first norm is none any more."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    (path / HASHES).unlink(missing_ok=True)


@functools.cache
def theirs(path: Path):
    """The model in ``transformers``, in float64, which its grouped experts cannot."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if path.name in ("moe", "switch-hf") else torch.float64
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def write_megatron(plan: Plan, path: Path, tokenizer: SentencePiece) -> None:
    """As a step directory with its tokenizer."""
    manifest = {"format": FORMAT, **plan.architecture.to_json(), "precision": "fp32"}
    write_torch_dist(plan, path, files=lambda: {MANIFEST: as_json(manifest)})
    tokenizer.save(path / "tokenizer")


def log_probs(path: Path, ids: list[int]) -> Tensor:
    """Log-probabilities [len(ids), V] of what follows each token, by ``transformers``."""
    return _log_probs(path, tuple(ids))


@functools.cache
@torch.no_grad()
def _log_probs(path: Path, ids: tuple[int, ...]) -> Tensor:
    return theirs(path)(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
