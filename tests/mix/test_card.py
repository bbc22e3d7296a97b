"""The README.md and verification.json that a mix carries, as the hub reads them."""

from __future__ import annotations

import io
import json
import re
import shutil
import typing
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_btx.data.tokenizer_sentencepiece import train_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.mix import offline
from megatron_btx.mix.card import _METHODS, _what
from megatron_btx.mix.plans import mix_of
from megatron_btx.mix.reference import verify
from megatron_btx.mix.request import MixMethod, MixRequest
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model
from megatron_btx.weights.card import Card, CardModel, Claim, hub_id, record
from megatron_btx.weights.directory import add_files
from megatron_btx.weights.file_hashes import hashes_of
from tests.families.made import make
from tests.families.tokenizers_made import TEXT

hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model in the hub's cache and one elsewhere."""
    root = tmp_path_factory.mktemp("card")
    cached = root / "models--some-lab--Llama-3.2-1B" / "snapshots" / "0123"
    for path in (cached, root / "math"):
        make("llama", path)
    sources = (f"code={cached}", f"math={root / 'math'}")
    offline.run(MixRequest(sources=sources, out=str(root / "moe")), io.StringIO(), "abc123")
    return root / "moe"


def test_the_hub_reads_the_card(mixed: Path) -> None:
    card = hub.ModelCard.load(mixed / "README.md")
    said = card.data.to_dict()
    assert said["library_name"] == "transformers"
    assert said["pipeline_tag"] == "text-generation"
    assert said["base_model"] == ["some-lab/Llama-3.2-1B"]
    assert {"moe", "megatron-btx"} <= set(said["tags"])
    assert "| code | expert 0 | some-lab/Llama-3.2-1B |" in card.text
    assert "| math | expert 1 | math |" in card.text
    assert str(mixed.parent) not in card.text, "a place of this machine"


def test_what_llama_cpp_does_not_read_is_said(tmp_path: Path) -> None:
    """By the command, before it writes and after, and by the card."""
    tokenizer = train_tokenizer(TEXT * 20, 400, where="it")
    for label in ("code", "math"):
        make("qwen3", tmp_path / label, vocab_size=400)
        tokenizer.save_huggingface(tmp_path / label)
    sources = tuple(f"{label}={tmp_path / label}" for label in ("code", "math"))
    request = MixRequest(sources=sources, out=str(tmp_path / "moe"))
    why = "its converter refuses a qwen3_moe with this SentencePiece tokenizer"
    for asked in (replace(request, dry_run=True), request):
        said = io.StringIO()
        offline.run(asked, said)
        assert f"llama.cpp: {why}\n" in said.getvalue()
    assert f"- {why}\n" in (tmp_path / "moe" / "README.md").read_text()


def test_every_number_stands_in_a_file(mixed: Path) -> None:
    """In the lineage, config.json, or, of the model's size, counted on the tensors."""
    lineage = json.loads((mixed / "mix.json").read_text())
    text = (mixed / "README.md").read_text()
    for source in lineage["sources"]:
        assert source["sha256"]["model.safetensors"] in text
    assert lineage["plan"] in text
    for name, version in lineage["versions"].items():
        assert f"{name} {version}" in text
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(mixed)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    claims = json.loads((mixed / "verification.json").read_text())["claims"]
    assert {claim["command"] for claim in claims} == {"btx verify ."}
    files = sum(len(source["sha256"]) for source in lineage["sources"])
    assert claims[0]["figure"] == {"files": files}


def test_the_claims_command_holds(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixed)
    assert verify.show(Path(), io.StringIO()) == 0
    add_files(mixed, {"notes.md": b"mine"})
    assert verify.show(Path(), io.StringIO()) == 0


def test_what_verify_finds_is_recorded(mixed: Path, tmp_path: Path) -> None:
    """Once, however often; and not where something is wrong."""
    result = tmp_path / "moe"
    shutil.copytree(mixed, result)
    for _ in range(2):
        assert verify.show(result, io.StringIO(), keep=True) == 0
        *others, claim = json.loads((result / "verification.json").read_text())["claims"]
        assert claim["command"] == "btx verify ."
        tensors = len(load_file(result / "model.safetensors"))
        assert claim["figure"] == {"files": len(hashes_of(result)), "tensors": tensors}
        assert all(one["claim"] != claim["claim"] for one in others)
        text = (result / "README.md").read_text()
        assert text.count(f"| {claim['claim']} | files") == 1
        assert "## Versions" in text
    said = (result / "verification.json").read_bytes()
    (result / "README.md").write_text("mine")
    assert verify.show(result, io.StringIO(), keep=True) == 1
    assert (result / "verification.json").read_bytes() == said
    with pytest.raises(UserError, match="has no verification.json"):
        record(tmp_path, Claim(**claim))


def test_names_are_no_markup() -> None:
    shape = Model(num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=1)
    odd = "a|b<script>*`[x](y)\nz"
    text = Card(
        title=odd,
        method="As it is.",
        architecture=Architecture(model=shape, vocab_size=8),
        models=[CardModel(name=odd, what="it", path="a/b")],
        claims=[Claim(claim="one", figure={"x": 0.1234567891}, command="true")],
    ).text()
    body = text.partition("## Made of")[2]
    assert "<script>" not in body.replace("\\<script\\>", "")
    (row,) = (line for line in body.splitlines() if "script" in line)
    assert len(re.split(r"(?<!\\)\|", row)) == 5, "three cells"
    assert "| one | x 0.123457 | true |" in text
    assert hub.ModelCard(text).data.to_dict()["library_name"] == "transformers"


def test_an_expert_is_of_the_model_of_its_name() -> None:
    """A name may have dots in it, as experts' numbers have one in front."""
    models = ("Code-3.1-8B", "Code-3")
    granular = MixRequest(method="upcycle", copies=2, num_chunks=2)
    for request, wanted in (
        (MixRequest(), ["expert 0", "expert 1"]),
        (MixRequest(method="split", num_chunks=2), ["experts 0, 1", "experts 2, 3"]),
        (granular, ["experts 0, 1, 2, 3", "experts 4, 5, 6, 7"]),
        (MixRequest(method="append"), ["a source"] * 2),
    ):
        experts = mix_of(request).expert_names(models)
        assert [_what(name, experts, request) for name in models] == wanted


def test_every_method_is_told() -> None:
    assert set(_METHODS) == set(typing.get_args(MixMethod))


def test_only_the_hubs_own_cache_names_a_model_of_it() -> None:
    assert hub_id("/x/models--a--b.c/snapshots/1") == "a/b.c"
    assert hub_id("/x/a/b") is None
