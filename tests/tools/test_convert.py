"""``btx convert`` by its doors in tools/convert, and what a recipe takes from Hugging Face."""

from __future__ import annotations

import argparse
import io
import json
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from megatron_btx.data.prepare import prepare
from megatron_btx.data.tokenizer import train_tokenizer
from megatron_btx.errors import UserError
from megatron_btx.families import open_hf
from megatron_btx.families.family import computed
from megatron_btx.mix import offline
from megatron_btx.mix.reference import verify
from megatron_btx.mix.request import MixRequest
from megatron_btx.pipeline import graph, import_checkpoint
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.schema import Model, Recipe
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.megatron_lm_args import architecture_of
from megatron_btx.weights.source import read_whole
from tests.families.made import make
from tests.families.tokenizers_made import llama3

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools" / "convert"
TEXT = "the quick brown fox jumps over a lazy dog while seven wizards mix jars of quartz"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a script of tools/convert: (exit code, what it said)."""

    def run(script: str, *words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()  # what others have said so far
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
        said = capsys.readouterr()
        return left.value.code, said.out + said.err

    return run


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A directory as models are released: weights, tokenizer, settings for generation."""
    directory = tmp_path_factory.mktemp("released")
    words = TEXT.split()
    texts = [" ".join(words[i:] + words[:i]) + f" {i}" for i in range(len(words))]
    tokenizer = train_tokenizer(texts * 20, 400, where="test")
    tokens = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 2}
    model = make("qwen2, some windows", directory, vocab_size=512, **tokens)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(directory)
    tokenizer.save_huggingface(directory)
    (directory / "tokenizer.model").unlink()
    return directory


def same(one: Path, other: Path) -> None:
    """Both directories hold one model."""
    models = [open_hf(path, "m") for path in (one, other)]
    assert computed(models[0].architecture) == computed(models[1].architecture)
    for name in models[0].tensors:
        assert torch.equal(*(read_whole(model.source, name) for model in models)), name


def test_there_and_back_is_self_contained(tmp_path, tool, released):
    code, said = tool("hf_to_megatron.py", released, tmp_path / "megatron")
    assert code == 0, said
    code, said = tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert code == 0, said
    same(released, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        1,
        [2, 5],
        2,
    )
    settings = "generation_config.json"
    assert (tmp_path / "back" / settings).read_bytes() == (released / settings).read_bytes()
    text = "a lazy fox, 12 jars"
    ids = [
        transformers.AutoTokenizer.from_pretrained(d)(text) for d in (released, tmp_path / "back")
    ]
    assert ids[0] == ids[1]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    tokens = torch.tensor([ids[0]["input_ids"]])
    assert model.generate(tokens, max_new_tokens=4).shape == (1, tokens.shape[1] + 4)
    code, said = tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert code == 2
    assert "exists already" in said


def test_a_family_can_be_chosen_where_it_computes_the_model(tmp_path, tool):
    make("mistral, no window", tmp_path / "in")
    assert tool("hf_to_megatron.py", tmp_path / "in", tmp_path / "megatron")[0] == 0
    for family in ("mistral", "llama"):
        words = ("--format", family) if family == "llama" else ()
        code, said = tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / family, *words)
        assert code == 0, said
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["model_type"] == family
        same(tmp_path / "in", tmp_path / family)
    for family, reason in (("qwen3", "qk_layernorm would be True"), ("gpt2", "no known family")):
        out = tmp_path / family
        code, said = tool("megatron_to_hf.py", tmp_path / "megatron", out, "--format", family)
        assert code == 2
        assert reason in said
        assert not out.exists()
    code, said = tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "x", "--fused")
    assert code == 2
    assert "has no experts" in said


def test_neither_transformers_nor_a_network_is_needed(tmp_path, released):
    """In a process where importing the one fails and a socket cannot be made."""
    program = (
        "import runpy, socket, sys\n"
        "sys.modules['transformers'] = None\n"
        "socket.socket.connect = None\n"
        "script, sys.argv = sys.argv[1], sys.argv[1:]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", program, str(TOOLS / "hf_to_megatron.py")]
    done = subprocess.run(
        [*command, released, tmp_path / "out", "--memory", "1GiB"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "name",
    ["llama 3.2, tied", "qwen2, some windows", "qwen3", "smollm3", "qwen2 moe", "mixtral, window"],
)
def test_megatron_lm_is_told_the_same_model(tmp_path, tool, name):
    """Its own words, read again by what reads Megatron-LM's checkpoints."""
    make(name, tmp_path)
    want = open_hf(tmp_path, "m").architecture
    code, said = tool("megatron_lm_args.py", tmp_path, "--tensor-model-parallel-size", 2)
    assert code == 0, said
    words = shlex.split(said.replace("\\\n", ""), comments=True)
    flags = [at for at, word in enumerate(words) if word.startswith("--")]
    settings: dict[str, object] = {}
    for at, end in zip(flags, [*flags[1:], len(words)], strict=True):
        value = yaml.safe_load(words[at + 1]) if end > at + 1 else True
        settings[words[at][2:].replace("-", "_")] = value
    settings["norm_epsilon"] = float(str(settings["norm_epsilon"]))
    if "window_size" in settings:
        settings["window_size"] = tuple(map(int, str(settings["window_size"]).split(",")))
    settings.setdefault("untie_embeddings_and_output_weights", False)  # a flag's default
    # Its softmax runs over the padding: no more of it than TP needs.
    assert settings.pop("make_vocab_size_divisible_by") == 1
    assert "dist_ckpt_strictness" not in settings
    dropped = "config.rope_scaling_factor = 32.0" in said
    assert dropped == (name == "llama 3.2, tied")
    found = architecture_of(vars(argparse.Namespace(**settings)), "arguments")
    assert computed(found) == computed(want)


@pytest.mark.parametrize(
    ("name", "found"),
    [("granite", "embedding_multiplier: is 12.0, which Megatron's own layers do not compute")],
)
def test_what_megatron_lm_does_not_compute_is_refused(tmp_path, tool, name, found):
    make(name, tmp_path)
    code, said = tool("megatron_lm_args.py", tmp_path)
    assert code == 2
    assert found in said


def test_mistakes_are_one_message(tmp_path, tool, released):
    step = tmp_path / "step"
    assert tool("hf_to_megatron.py", released, step)[0] == 0
    for tp in (0, -2):
        said = tool("megatron_lm_args.py", step, "--tensor-model-parallel-size", tp)
        assert said[0] == 2
        assert f"--tensor-model-parallel-size: is {tp}" in said[1]
    (step / "manifest.json").write_text("{")
    code, text = tool("megatron_to_hf.py", step, tmp_path / "out")
    assert code == 2
    assert "manifest.json: is damaged" in text
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "granite"])
def test_mixes_of_every_family_are_verified(tmp_path, name, fused):
    """By the second implementation, which reads what was written."""
    for label in "ab":
        make(name, tmp_path / label)
    sources = tuple(f"{label}={tmp_path / label}" for label in "ab")
    offline.run(MixRequest(sources=sources, out=str(tmp_path / "moe"), fused=fused), io.StringIO())
    out = io.StringIO()
    assert verify.show(tmp_path / "moe", out) == 0, out.getvalue()


def recipe_text(seed: Path, block: str) -> str:
    """A recipe that begins with a directory of Hugging Face's."""
    text = " ".join([TEXT] * 40)
    data, held = (seed.parent / f"{seed.name}{end}.jsonl" for end in ("", "-valid"))
    for file, first in ((data, 0), (held, 4)):
        lines = (json.dumps({"text": f"{first + i} {text}"}) + "\n" for i in range(4))
        file.write_text("".join(lines))
    return (
        f"name: taken\n{block}"
        f"domains:\n  web: {{train: {data}, valid: {held}}}\n"
        "training: {global_batch_size: 4}\n"
        f"seed: {{from: {seed}}}\n"
        f"experts: {{web: {{from: {seed}}}}}\n"
        "finetune: {tokens: 1000, data: {web: 1}}\n"
    )


@pytest.fixture
def taking(tmp_path, tool, released) -> Recipe:
    """The recipe with the block that the tool printed."""
    code, block = tool("hf_to_megatron.py", released)
    assert code == 0, block
    (tmp_path / "recipe.yaml").write_text(recipe_text(released, block))
    return load_recipe(tmp_path / "recipe.yaml")


def test_a_recipe_begins_with_a_hugging_face_directory(tmp_path, taking, released):
    assert taking.tokenizer.vocab_size == 512  # the model's, which has rows for more
    import_checkpoint.check(taking, "seed")
    for name in ("seed", "expert:web"):
        outputs = import_checkpoint.link(taking, name, tmp_path)
        assert outputs["from"] == str(released)
        opened = open_megatron(tmp_path / outputs["checkpoint"], "m")
        original = open_hf(released, "m")
        assert opened.architecture == original.architecture
        for each in original.tensors:
            assert torch.equal(read_whole(opened.source, each), read_whole(original.source, each))
        assert import_checkpoint.link(taking, name, tmp_path) == outputs  # once is enough
    summary = prepare(taking, tmp_path / "prepare")
    assert summary["tokenizer"]["type"] == "huggingface"
    assert summary["tokenizer"]["sha256"] == opened.manifest["tokenizer"]["sha256"]


@pytest.mark.parametrize("file", ["", "/tokenizer.json"])
def test_a_recipe_may_name_the_seed_s_tokenizer(tmp_path, taking, released, file):
    """As a directory or a file, without saying that it is Hugging Face's."""
    block = f"tokenizer: {{path: {released}{file}, vocab_size: 512}}\n"
    (tmp_path / "named.yaml").write_text(block + (tmp_path / "recipe.yaml").read_text())
    recipe = load_recipe(tmp_path / "named.yaml")
    summaries = [prepare(each, tmp_path / f"p{at}") for at, each in enumerate((taking, recipe))]
    assert summaries[0] == summaries[1]
    other = tmp_path / "other"
    llama3(other)
    named = replace(recipe, tokenizer=replace(recipe.tokenizer, path=str(other)))
    with pytest.raises(UserError, match="is not the tokenizer that the seed was trained with") as e:
        prepare(named, tmp_path / "p2")
    assert "vocabulary: " in e.value.what


def test_experts_of_one_tokenizer_in_other_bytes_are_taken(tmp_path, taking, released):
    again = tmp_path / "again"
    shutil.copytree(released, again)
    raw = json.loads((again / "tokenizer.json").read_text())
    raw["model"]["merges"] = [" ".join(pair) for pair in raw["model"]["merges"]]
    (again / "tokenizer.json").write_text(json.dumps(raw))
    text = (tmp_path / "recipe.yaml").read_text()
    more = f"experts: {{more: {{from: {again}}}, web: "
    (tmp_path / "two.yaml").write_text(text.replace("experts: {web: ", more))
    recipe = load_recipe(tmp_path / "two.yaml")
    stages = graph.build(recipe)
    import_checkpoint.check_all(recipe, stages)
    raw["normalizer"] = None
    (again / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="has another tokenizer than .*: normalizer: "):
        import_checkpoint.check_all(recipe, stages)
    (again / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="one comes without its tokenizer's files"):
        import_checkpoint.check_all(recipe, stages)


def test_a_block_of_another_model_is_refused(taking):
    changed = replace(taking, model=replace(taking.model, window_size=None))
    with pytest.raises(UserError, match=r"window_size: \(6, 0\) there, None here") as caught:
        import_checkpoint.check(changed, "seed")
    assert "btx convert hf-to-megatron" in caught.value.fix


def test_the_printed_block_is_the_model(taking, released):
    assert isinstance(taking.model, Model)
    assert computed(replace(open_hf(released, "m").architecture, model=taking.model)) == computed(
        open_hf(released, "m").architecture
    )
