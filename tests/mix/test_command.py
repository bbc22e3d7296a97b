"""``btx mix`` as it is used: directories in, a directory out, or one clear error."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.families import open_hf
from megatron_btx.mix.reference.rules import nearest
from megatron_btx.recipe.names import group_of
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.source import MemorySource, read_whole
from tests.mix.commands import LABELS, RUN, btx, named, save
from tests.weights.models import DENSE, dense
from tests.weights.test_directories import tree_hash


@pytest.mark.parametrize("out_form", ["hf", "megatron"])
@pytest.mark.parametrize("in_form", ["hf", "megatron"])
def test_from_and_to_both_formats(sources, tmp_path, in_form, out_form):
    out = tmp_path / "out"
    code, text = btx(
        "mix", "--sources", *named(sources, in_form), "--out", out, "--format", out_form
    )
    assert code == 0
    assert "GB/s" in text
    result = open_hf(out, "out") if out_form == "hf" else open_megatron(out, "out")
    assert result.architecture.experts == LABELS
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    want = sum(read_whole(dense(label, i).source, name).bfloat16().double()
               for i, label in enumerate(LABELS)) / 4  # fmt: skip
    assert torch.equal(read_whole(result.source, name), nearest(want, torch.bfloat16))
    expert = read_whole(result.source, "decoder.layers.3.mlp.experts.2.linear_fc1.weight")
    own = read_whole(dense("prose", 2).source, "decoder.layers.3.mlp.linear_fc1.weight")
    assert torch.equal(expert, own.bfloat16())
    assert btx("verify", out)[0] == 0
    lineage = json.loads((out / "mix.json").read_text())
    assert [source["name"] for source in lineage["sources"]] == list(LABELS)
    for source in lineage["sources"]:
        path = sources / in_form / source["name"]
        big = [file for file in source["sha256"] if file.endswith((".safetensors", ".distcp"))]
        assert len(big) == (1 if in_form == "hf" else len(list(path.glob("*.distcp"))))
        for file in big:
            digest = hashlib.sha256((path / file).read_bytes()).hexdigest()
            assert source["sha256"][file] == digest


def test_every_source_format_gives_the_same_result(sources, tmp_path):
    weights = []
    for at, form in enumerate(("hf", "megatron")):
        out = tmp_path / form
        memory = ["--workers", "1"] if at else []
        btx("mix", "--sources", *named(sources, form), "--out", out, *memory)
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


WEIGHTS = ["code=1", "math=2", "prose=3.3", "seed=4"]
GROUPS = [f"{group}:{entry}" for group in ("norms", "head") for entry in reversed(WEIGHTS)]
MIXES = {
    "average": ["--method", "average"],
    "average by weights": ["--method", "average", "--average", *WEIGHTS],
    "average by groups": ["--average", *WEIGHTS, "--average-groups", *GROUPS],
    "average with dare": ["--method", "average", "--dare", "0.8"],
    "btx": ["--average", *WEIGHTS, "--router-init", "uniform"],
    "btx in fp32": ["--router-init", "zeros", "--dtype", "fp32"],
    "btx with dare": ["--dare", "0.7", "--average", *WEIGHTS],
    "average with ties": ["--method", "average", "--ties", "0.3"],
    "btx with ties": ["--ties", "0.2", "--average", *WEIGHTS],
    "btx with folded norms": ["--fold-norms"],
    "blend": ["--method", "blend"],
    "split": ["--method", "split", "--num-chunks", "3"],
    "split, unscaled": ["--method", "split", "--num-chunks", "2", "--scale", "none"],
}
UPCYCLES = {
    "copies": [],
    "noise": ["--noise", "0.02"],
    "drop": ["--drop-ratio", "0.4"],
    "granular": ["--num-chunks", "4", "--moe-router-topk", "8"],
    "cube root": ["--num-chunks", "2", "--scale", "cube_root", "--dtype", "fp32"],
    "everything": ["--num-chunks", "2", "--drop-ratio", "0.5", "--noise", "0.1"],
}


def verified(out) -> None:
    """The second implementation agrees, and names the one tensor in which a bit is flipped."""
    code, text = btx("verify", out)
    assert code == 0, text
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    for place in (-5, -len(data) // 3):
        data[place] ^= 1
        path.write_bytes(bytes(data))
        code, text = btx("verify", out)
        assert code == 1
        assert text.count("differs: ") == 1
        data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", MIXES)
def test_verify_agrees_and_finds_a_changed_bit(sources, tmp_path, name):
    out = tmp_path / "out"
    btx("mix", "--sources", *named(sources, "megatron"), "--out", out, *MIXES[name])
    verified(out)


@pytest.mark.parametrize("name", UPCYCLES)
def test_verify_upcycling(sources, tmp_path, name):
    words = ["--method", "upcycle", "--copies", "3", "--sources", named(sources)[1]]
    btx("mix", *words, "--out", tmp_path / "out", *UPCYCLES[name])
    verified(tmp_path / "out")
    btx("mix", *words, "--out", tmp_path / "m", "--format", "megatron", *UPCYCLES[name])
    assert btx("verify", tmp_path / "m")[0] == 0


def test_a_copy_was_trained_on_what_its_source_was(sources, tmp_path):
    """A Hugging Face model does not say on how many tokens."""
    source = tmp_path / "code"
    shutil.copytree(sources / "megatron" / "code", source)
    said = json.loads((source / "manifest.json").read_text())
    (source / "manifest.json").write_text(json.dumps(said | {"tokens": 12288}))
    for given, tokens in ((source, 12288), (sources / "hf" / "code", None)):
        out = tmp_path / f"of_{given.parent.name}"
        btx("mix", "--method", "copy", "--sources", given, "--format", "megatron", "--out", out)
        assert json.loads((out / "manifest.json").read_text())["tokens"] == tokens


def test_other_methods(sources, tmp_path):
    one = named(sources)[:1]
    btx("mix", "--method", "upcycle", "--copies", 3, "--sources", *one, "--out", tmp_path / "up")
    assert len(open_hf(tmp_path / "up", "up").architecture.experts) == 3
    two = named(sources)[:2]
    btx(
        "mix",
        "--method",
        "split",
        "--num-chunks",
        2,
        "--sources",
        *two,
        "--out",
        tmp_path / "split",
    )
    assert len(open_hf(tmp_path / "split", "s").architecture.experts) == 4
    moe = f"moe={tmp_path / 'up'}"
    add = ["--method", "append", "--sources", moe, named(sources)[1], "--out", tmp_path / "more"]
    btx("mix", *add)
    more = open_hf(tmp_path / "more", "more")
    assert more.architecture.experts == ("code.0", "code.1", "code.2", "math")
    less = ["--sources", f"m={tmp_path / 'more'}", "--expert", "math", "--out", tmp_path / "less"]
    btx("mix", "--method", "drop", *less)
    middle = [
        "--sources",
        f"m={tmp_path / 'more'}",
        "--expert",
        "code.1",
        "--out",
        tmp_path / "two",
    ]
    btx("mix", "--method", "drop", *middle)
    btx("mix", "--method", "copy", "--sources", tmp_path / "two", "--out", tmp_path / "same")
    for result in ("up", "split", "more", "less", "two", "same"):
        assert btx("verify", tmp_path / result)[0] == 0, result
    shutil.rmtree(tmp_path / "more")
    with pytest.raises(UserError, match="the source is not there"):
        btx("verify", tmp_path / "less")


def test_a_dry_run_prints_and_writes_nothing(sources, tmp_path):
    out = tmp_path / "out"
    _, text = btx("mix", "--sources", *named(sources), "--out", out, "--dry-run")
    assert (
        "experts.2.w1.weight\n    = prose:decoder.layers.*.mlp.linear_fc1.weight[0:48, :]" in text
    )
    assert "q_proj.weight\n    = (code:" in text
    for found in ("parameters", "active a token", "bytes read", "GiB free", "plan "):
        assert found in text
    assert not list(tmp_path.iterdir())


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["mix", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for told in ("the mix (default: btx)", "experts per token (default: 2)", "to write, by its "):
        assert told in said
    assert said.count("(default: the first that computes it)") == 1


def test_options_from_a_file(sources, tmp_path):
    config = tmp_path / "mix.yaml"
    config.write_text(
        yaml.safe_dump({"sources": named(sources), "method": "average", "dtype": "fp32"})
    )
    btx("mix", "--config", config, "--out", tmp_path / "out", "--dtype", "bf16")
    assert (
        open_hf(tmp_path / "out", "out").source.tensors["output_layer.weight"][1] is torch.bfloat16
    )
    config.write_text("method: mix\ncopies: many\nfoo: 1\nnum_chunks: 0\nnoise: 1e-4\n")
    with pytest.raises(UserError) as caught:
        btx("mix", "--config", config, "--out", tmp_path / "x")
    for found in (
        "mix.yaml:1: method: is 'mix'\n  fix: choose btx, upcycle",
        "mix.yaml:2: copies: is 'many', not a whole number",
        "mix.yaml:3: foo: is not a key of btx mix's options",
        "mix.yaml:4: num_chunks: is 0, out of range",
    ):
        assert found in str(caught.value)
    assert "noise: " not in str(caught.value), "1e-4 is a number"
    said = {}
    for form in (
        {"average": {"code": 1, "math": 2}, "average_groups": {"norms": {"code": 1, "math": 0.5}}},
        {"average": ["code=1", "math=2"], "average_groups": ["norms:code=1", "norms:math=0.5"]},
    ):
        config.write_text(yaml.safe_dump({"sources": named(sources)[:2], **form}))
        plan = btx("mix", "--config", config, "--out", tmp_path / "x", "--dry-run")[1]
        said[str(form)] = plan.partition("memory:")[0]
    assert len(set(said.values())) == 1, "as a recipe has weights, and as the flags"
    models = {"seed": str(sources / "hf" / "seed"), "math": "math"}
    (tmp_path / "math").symlink_to(sources / "hf" / "math")
    for form in (models, [f"{name}={place}" for name, place in models.items()]):
        text = {"sources": form, "method": "average"}
        config.write_text(yaml.safe_dump(text, sort_keys=False))  # the order of the experts
        plan = btx("mix", "--config", config, "--out", tmp_path / "x", "--dry-run")[1]
        said[str(form)] = plan.partition("memory:")[0]
    assert said[str(models)] == said[str(form)], "by name, as a recipe has its experts"
    config.write_text("sources: {code: 5, math: math}\n")
    with pytest.raises(UserError, match=r"1: sources.code: is 5, not text"):
        btx("mix", "--config", config, "--out", tmp_path / "x")
    config.write_text("method: copy\nmethod: drop\n")
    with pytest.raises(UserError, match="2: method: is set twice"):
        btx("mix", "--config", config, "--out", tmp_path / "x")


def test_paths_in_a_file_stand_from_its_directory(sources, tmp_path, monkeypatch, capsys):
    """And what only the current directory has is found, as earlier releases did, with a hint."""
    (tmp_path / "own").mkdir()
    config = tmp_path / "own" / "mix.yaml"
    monkeypatch.chdir(tmp_path)
    for label in ("code", "math"):
        (tmp_path / "own" / label).symlink_to(sources / "hf" / label)
    text = {"sources": ["code", "second=math"], "method": "average", "out": "made"}
    config.write_text(yaml.safe_dump(text))
    btx("mix", "--config", config)
    assert (tmp_path / "own" / "made").is_dir()
    (tmp_path / "lr=1e-4").symlink_to(sources / "hf" / "code")
    (tmp_path / "own" / "lr=1e-4").symlink_to(sources / "hf" / "math")  # no label
    config.write_text(yaml.safe_dump(text | {"sources": ["lr=1e-4", "code"], "out": "again"}))
    _, said = btx("mix", "--config", config, "--dry-run")
    assert "= (math:embedding" in said
    assert "hint" not in capsys.readouterr().err
    (tmp_path / "here").symlink_to(sources / "hf" / "code")
    config.write_text(yaml.safe_dump(text | {"sources": ["here", "math"], "out": "third"}))
    btx("mix", "--config", config)
    assert "sources[0]: here is taken from the current directory" in capsys.readouterr().err
    assert (tmp_path / "own" / "third").is_dir()


def test_drift_of_zeros_has_no_direction(tmp_path):
    """A file that other readers of JSON take: it has no NaN."""
    some = {n: read_whole(dense("a", 0).source, n) for n in dense("a", 0).tensors}
    zero = {n: torch.zeros_like(t) if group_of(n) == "attention" else t for n, t in some.items()}
    for label, tensors in (("a", zero), ("b", zero), ("seed", some)):
        save(replace(dense(label, 0), source=MemorySource(tensors)), tmp_path / label, "hf")
    words = [tmp_path / label for label in ("a", "b", "seed")]
    code, text = btx("drift", "--sources", *words, "--out", tmp_path / "drift")
    assert code == 0
    assert "nan" not in text + (tmp_path / "drift" / "drift.svg").read_text()
    content = (tmp_path / "drift" / "drift.json").read_text()
    rows = json.loads(content, parse_constant=lambda word: pytest.fail(word))
    for row in rows:
        is_zero, is_equal = row["group"] == "attention", row["models"] == ["a", "b"]
        assert row["relative_l2"] == (None if is_zero and not is_equal else 0)
        assert (row["cosine"] is None) == is_zero
    with pytest.raises(UserError, match="is one model: there is nothing to compare"):
        btx("drift", "--sources", tmp_path / "a")


def test_how_far_models_have_drifted(sources, tmp_path):
    near = dense("code", 0)
    tensors = {n: read_whole(near.source, n) for n in near.tensors}
    moved = {n: t * 1.25 if "linear_fc" in n and "norm" not in n else t for n, t in tensors.items()}
    save(near, tmp_path / "seed", "hf", torch.float32)
    save(replace(near, source=MemorySource(moved)), tmp_path / "math", "hf", torch.float32)
    words = ["--sources", tmp_path / "seed", tmp_path / "math", "--out", tmp_path / "drift"]
    _, text = btx("drift", *words)
    assert "seed - math" in text
    rows = json.loads((tmp_path / "drift" / "drift.json").read_text())
    assert len(rows) == 3 + 3 * DENSE.model.num_layers
    for row in rows:
        want = 0.25 if row["group"] == "ffn" else 0.0
        assert abs(row["relative_l2"] - want) < 1e-6
        assert abs(row["cosine"] - 1) < 1e-9
    assert (tmp_path / "drift" / "drift.svg").read_text().startswith("<svg")
    for name in ("one.svg", "one.csv"):
        btx("drift", *words[:-1], tmp_path / name)
        assert (tmp_path / name).is_file()
        btx("drift", *words[:-1], tmp_path / name)  # ours is written anew
    assert (tmp_path / "one.svg").read_text() == (tmp_path / "drift" / "drift.svg").read_text()
    with (tmp_path / "one.csv").open(newline="") as file:
        told = list(csv.DictReader(file))
    for row, line in zip(rows, told, strict=True):
        assert [line["model"], line["other"]] == row["models"]
        assert float(line["relative_l2"]) == row["relative_l2"]
    (tmp_path / "mine.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="exists and was not written by btx"):
        btx("drift", *words[:-1], tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text() == "a,b\n"


def test_the_command_loads_no_torch():
    code = "import sys, megatron_btx.cli.mix; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


KILLED = """
import os, signal, sys
from megatron_btx.cli.main import main

left, replace = {files}, os.replace

def replaced(source, target):
    global left
    replace(source, target)
    left -= str(target).endswith(".safetensors")
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replaced
sys.exit(main(sys.argv[1:]))
"""
"""``btx``, killed when so many more files have their names."""


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    """kill -9 while pieces are written; the sources are large enough for several."""
    big = replace(DENSE, model=replace(DENSE.model, hidden_size=512, ffn_hidden_size=2048))
    big = replace(big, vocab_size=2000)
    for seed, label in enumerate("ab"):
        save(dense(label, seed, architecture=big), tmp_path / label, "hf")
    words = [sys.executable, "-c", RUN, "mix", "--sources", tmp_path / "a", tmp_path / "b"]
    words += ["--shard", "4MB"]
    btx(*words[3:], "--out", tmp_path / "once")
    for files in (1, 6):
        killed = [sys.executable, "-c", KILLED.format(files=files), *words[3:]]
        done = subprocess.run([*killed, "--out", tmp_path / "out"], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) >= files
    btx(*words[3:], "--out", tmp_path / "out")
    lineage = [json.loads((tmp_path / d / "mix.json").read_text()) for d in ("out", "once")]
    for one, directory in zip(lineage, ("out", "once"), strict=True):
        one.pop("code")  # whoever edits the package meanwhile
        (tmp_path / directory / "mix.json").unlink()
    assert lineage[0] == lineage[1]
    assert tree_hash(tmp_path / "out") == tree_hash(tmp_path / "once")
