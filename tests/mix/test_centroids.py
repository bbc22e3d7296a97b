"""Routers from centroids: the means against ``transformers``, the rows against plain loops."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.evaluate.centroids import as_file
from megatron_btx.evaluate.model_spec import parse
from megatron_btx.evaluate.packed_text import PackedText
from megatron_btx.evaluate.router_init_rows import (
    joined,
    no_sums,
    read_sums,
    ridge_rows,
    version_of,
    write_results,
)
from megatron_btx.families import open_hf
from megatron_btx.families.export import write_hf
from megatron_btx.mix.one_model import copy, forced
from megatron_btx.recipe.schema import Layout
from tests.bad import PAGE, fill
from tests.engine.test_layouts import PP2, TP2
from tests.evaluate.made import TEXTS, moe, random_model, tokenizer, with_nan, write
from tests.mix.commands import btx
from tests.mix.ranks_side import measure_centroids

DP2 = Layout(data_parallel_size=2)
NAMES = ("a", "b", "c", "d")
DATA = {"a": "x", "b": "y", "c": "x", "d": "y"}
LENGTH = 16
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "recipe.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An MoE, its dense models, and the domains' text."""
    root = tmp_path_factory.mktemp("centroids")
    write(moe(tokenizer()), root / "moe", tokenizer())
    for seed, name in enumerate(NAMES):
        write(random_model(tokenizer(), seed), root / name, tokenizer())
    for name, text in DATA.items():
        part = TEXTS[text][:9] if name in "ab" else TEXTS[text][3:]
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in part))
    return root


@pytest.fixture(scope="module")
def inputs(made):
    """By ``transformers``: what the FFNs of each forced expert are given, [layers, tokens, H], of
    every whole sequence."""
    import transformers

    plan = copy(open_hf(made / "moe", "moe"), dtype=torch.float32)
    spoken = tokenizer()
    found = {}
    for expert, name in enumerate(NAMES):
        write_hf(forced(plan, expert), made / f"forced-{name}")
        model = transformers.AutoModelForCausalLM.from_pretrained(made / f"forced-{name}").eval()
        lines = (made / f"{name}.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        text = PackedText(texts, spoken, LENGTH, start_id=spoken.eos_id)
        rows = torch.stack([text[i]["tokens"] for i in range(text.size.tokens // LENGTH)])
        seen: list[torch.Tensor] = []

        def keep(_module, _inputs, output, seen=seen):
            seen.append(output.double())

        for layer in model.model.layers:
            layer.post_attention_layernorm.register_forward_hook(keep)
        with torch.no_grad():
            model(rows)
        found[name] = torch.stack(seen).flatten(1, 2)
    return found


@pytest.mark.parametrize("layout", [Layout(), DP2, TP2, PP2], ids=["one", "dp2", "tp2", "pp2"])
def test_centroids_are_the_means_of_what_the_experts_are_given(
    ranks, made, inputs, tmp_path, layout
):
    seen = inputs
    out = tmp_path / "centroids.safetensors"
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    results = ranks.run(measure_centroids, layout.world_size, subject, layout, files, out, LENGTH)
    rows = load_file(out)
    means = torch.stack([seen[name].mean(1) for name in NAMES], 1)
    for layer in range(2):
        centred = means[layer] - means[layer].mean(0)
        every = torch.cat([seen[name][layer] for name in NAMES])
        logits = every @ centred.T
        spread = logits.var(1, correction=0).mean().sqrt()
        for expert, name in enumerate(NAMES):
            got = rows[f"decoder.layers.{layer}.mlp.router.weight/{name}"].double()
            torch.testing.assert_close(got, centred[expert] * 0.7 / spread, rtol=2e-4, atol=1e-5)
    own = {
        name: sum((seen[name][k] @ (means[k] - means[k].mean(0)).T).argmax(1).eq(e).double().mean()
                  for k in range(2)).item() / 2 for e, name in enumerate(NAMES)}  # fmt: skip
    assert results[0]["own"] == pytest.approx(own, abs=0.02)


@pytest.mark.parametrize("layout", [Layout(), DP2, TP2, PP2], ids=["one", "dp2", "tp2", "pp2"])
def test_ridge_is_the_regression_of_the_domain_on_what_the_experts_are_given(
    ranks, made, inputs, tmp_path, layout
):
    out, files = tmp_path / "ridge", {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    how = {"kind": "ridge", "regularization": 0.01}
    ranks.run(measure_centroids, layout.world_size, subject, layout, files, out, LENGTH, how)
    rows = load_file(out)
    for layer in range(2):
        x = torch.cat([inputs[name][layer] for name in NAMES]).numpy()
        y = np.repeat(np.eye(4), [len(inputs[name][layer]) for name in NAMES], axis=0)
        penalty = np.sqrt(0.01 * (x**2).sum() / x.shape[1]) * np.eye(x.shape[1])
        wanted, *_ = np.linalg.lstsq(np.vstack([x, penalty]), np.vstack([y, 0 * penalty[:, :4]]))
        got = [rows[f"decoder.layers.{layer}.mlp.router.weight/{name}"].numpy() for name in NAMES]
        # the inputs themselves are equal to fp32's rounding only
        np.testing.assert_allclose(np.stack(got), wanted.T, rtol=1e-3, atol=1e-4)


def test_ridge_solves_as_lstsq_does():
    generator = torch.Generator().manual_seed(5)
    sums = no_sums(("a", "b", "c"), 2, 24, gram=True, device=torch.device("cpu"))
    x = torch.randn(2, 3, 100, 24, generator=generator)
    for layer, domain in itertools.product(range(2), range(3)):
        x[layer, domain] += 0.3 * domain
        sums.add(layer, domain, x[layer, domain])
    rows = ridge_rows(sums, 1e-3)
    for layer in range(2):
        flat = x[layer].flatten(0, 1).double().numpy()
        y = np.repeat(np.eye(3), 100, axis=0)
        penalty = np.sqrt(1e-3 * (flat**2).sum() / 24) * np.eye(24)
        wanted, *_ = np.linalg.lstsq(np.vstack([flat, penalty]), np.vstack([y, np.zeros((24, 3))]))
        np.testing.assert_allclose(rows[layer].numpy(), wanted.T, rtol=1e-10, atol=1e-12)
    part = no_sums(("c", "a"), 2, 24, gram=True, device=torch.device("cpu"))
    later = no_sums(("b",), 2, 24, gram=True, device=torch.device("cpu"))
    for layer in range(2):
        part.add(layer, 0, x[layer, 2])
        part.add(layer, 1, x[layer, 0])
        later.add(layer, 0, x[layer, 1])
    again = ridge_rows(joined(later, part, ("a", "b", "c")), 1e-3)
    torch.testing.assert_close(again, rows, rtol=1e-10, atol=1e-12)


def test_sums_and_rows_are_written_together_or_not_at_all(tmp_path, disk):
    """On a full disk, and where another process has added a domain or written the rows meanwhile:
    what it wrote stays."""
    sums = no_sums(("a", "b"), 2, 24, gram=True, device=torch.device("cpu"))
    place = disk("nr_blocks=16")
    fill(place)
    for left, name in ((0, "sums"), (4 * PAGE, "out")):  # the sums are of 10 kB
        os.truncate(place / "filler", (place / "filler").stat().st_size - left)
        with pytest.raises(OSError, match=f"No space.*{name}"):
            write_results(place / "out", bytes(10 * PAGE), place / "sums", sums, None)
        assert os.listdir(place) == ["filler"]
    out, kept = tmp_path / "out", tmp_path / "sums"
    write_results(out, b"rows", kept, sums, version_of(kept))
    assert read_sums(kept, 2, 24).domains == ("a", "b")
    before = kept.read_bytes()
    with pytest.raises(UserError, match="out: has appeared while the text was read"):
        write_results(out, b"others", kept, sums, version_of(kept))
    assert (out.read_bytes(), kept.read_bytes()) == (b"rows", before)
    version = version_of(kept)
    out.unlink()
    write_results(out, b"rows", kept, sums, version)
    with pytest.raises(UserError, match="changed while the text was read"):
        write_results(tmp_path / "other", b"rows", kept, sums, version)
    assert sorted(os.listdir(tmp_path)) == sorted(["out", "sums", place.name])


def _write_at_once(start, out, number, statistics, version):
    """What a process does: its exit code tells whether it has written."""
    sums = no_sums((f"{number}",), 2, 24, gram=True, device=torch.device("cpu"))
    start.wait(600)
    try:
        write_results(out, b"%d" % number, statistics, sums, version)
    except UserError:
        os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("shared", ["new sums", "sums", "rows"])
def test_of_processes_that_write_one_file_at_once_one_does(tmp_path, shared):
    """The others say so, and leave nothing."""
    context = multiprocessing.get_context("fork")
    for turn in range(5):
        place = tmp_path / str(turn)
        place.mkdir()
        kept = None if shared == "rows" else place / "sums"
        if shared == "sums":
            before = no_sums(("x",), 2, 24, gram=True, device=torch.device("cpu"))
            write_results(place / "first", b"", kept, before, None)
        outs = [place / ("out" if shared == "rows" else f"out-{n}") for n in range(3)]
        start, version = context.Barrier(3), version_of(kept)
        asked = [(start, out, number, kept, version) for number, out in enumerate(outs)]
        workers = [context.Process(target=_write_at_once, args=one) for one in asked]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(600)
        assert sorted(worker.exitcode for worker in workers) == [0, 3, 3]
        (winner,) = (number for number, worker in enumerate(workers) if not worker.exitcode)
        assert outs[winner].read_bytes() == b"%d" % winner
        there = {outs[winner].name, *(["sums"] if kept else []), *(["first"] * (shared == "sums"))}
        assert set(os.listdir(place)) == there
        assert kept is None or read_sums(kept, 2, 24).domains == (f"{winner}",)


def test_a_file_system_without_hard_links_keeps_what_is_there(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    sums = no_sums(("a",), 2, 24, gram=True, device=torch.device("cpu"))
    write_results(tmp_path / "out", b"rows", tmp_path / "sums", sums, None)
    with pytest.raises(UserError, match="out: has appeared"):
        write_results(tmp_path / "out", b"others", None, sums, None)
    assert (tmp_path / "out").read_bytes() == b"rows"
    assert sorted(os.listdir(tmp_path)) == ["out", "sums"]


def test_an_moe_that_computes_nan_has_no_rows(ranks, made, tmp_path):
    given = shutil.copytree(made / "moe", tmp_path / "moe")
    with_nan(given)
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    out, how = tmp_path / "out", {"kind": "ridge", "statistics": tmp_path / "sums"}
    (subject,) = parse([str(given)])
    (found,) = ranks.run(measure_centroids, 1, subject, Layout(), files, out, LENGTH, how)
    assert "computes NaN or infinity on the text of a, b, c, d" in found["error"]
    assert sorted(os.listdir(tmp_path)) == ["moe"]


def test_a_domain_added_later_is_as_if_it_had_been_there(ranks, made, tmp_path):
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    ridge = {"kind": "ridge", "statistics": tmp_path / "sums"}

    def measured(names, out, how):
        given = {name: files[name] for name in names}
        return ranks.run(measure_centroids, 1, subject, Layout(), given, out, LENGTH, how)[0]

    assert "no text for the expert d" in measured("abc", tmp_path / "no", ridge)["error"]
    assert not (tmp_path / "sums").exists()
    measured("abcd", tmp_path / "all", {"kind": "ridge"})
    write(moe(tokenizer(), names="abc"), tmp_path / "three", tokenizer())
    (three,) = parse([str(tmp_path / "three")])
    given = {name: files[name] for name in "abc"}
    ranks.run(measure_centroids, 1, three, Layout(), given, tmp_path / "x", LENGTH, ridge)
    again = measured("abd", tmp_path / "no", ridge)["error"]
    assert "holds the domain a already" in again
    found = measured("d", tmp_path / "added", ridge)
    assert list(found["own"]) == ["d"]
    assert set(load_file(tmp_path / "added")) == set(load_file(tmp_path / "all"))


def test_a_mix_takes_them_and_is_verified(ranks, made, tmp_path):
    out = tmp_path / "c.safetensors"
    files = {name: [str(made / f"{name}.jsonl")] for name in NAMES}
    (subject,) = parse([str(made / "moe")])
    ranks.run(measure_centroids, 1, subject, Layout(), files, out, LENGTH)
    words = ["mix", "--sources", *(made / name for name in NAMES), "--router-init", "centroids"]
    btx(*words, "--centroids", out, "--out", tmp_path / "mixed")
    assert btx("verify", tmp_path / "mixed")[0] == 0
    gate = load_file(tmp_path / "mixed" / "model.safetensors")
    got = gate["model.layers.1.block_sparse_moe.gate.weight"]
    rows = load_file(out)
    for expert, name in enumerate(NAMES):
        assert torch.equal(got[expert], rows[f"decoder.layers.1.mlp.router.weight/{name}"])
    lineage = json.loads((tmp_path / "mixed" / "mix.json").read_text())
    assert len(lineage["centroids_sha256"]) == 64
    with pytest.raises(UserError, match="router rows of centroids, and router_init is ridge"):
        btx(*words[:-1], "ridge", "--centroids", out, "--out", tmp_path / "no")
    ridge = tmp_path / "ridge"
    ranks.run(measure_centroids, 1, subject, Layout(), files, ridge, LENGTH, {"kind": "ridge"})
    btx(*words[:-1], "ridge", "--centroids", ridge, "--out", tmp_path / "by_ridge")
    assert btx("verify", tmp_path / "by_ridge")[0] == 0
    three = ["mix", "--sources", *(made / name for name in "abc"), "--router-init", "centroids"]
    with pytest.raises(UserError, match="experts a, b, c, d, and those mixed are a, b, c"):
        btx(*three, "--centroids", out, "--out", tmp_path / "no")
    with pytest.raises(UserError, match="needs the file that `btx centroids` writes"):
        btx(*words, "--out", tmp_path / "no")
    split = ["--method", "split", "--num-chunks", 2, "--centroids", out, "--out", tmp_path / "no"]
    with pytest.raises(UserError, match="--centroids: has no meaning for method split"):
        btx(*words, *split)
    assert not (tmp_path / "no").exists()


def test_experts_without_text_are_named_at_once(ranks, made, tmp_path):
    (subject,) = parse([str(made / "moe")])
    files = {"a": [str(made / "a.jsonl")], "z": [str(made / "a.jsonl")]}
    out = tmp_path / "c.safetensors"
    found = ranks.run(measure_centroids, 1, subject, Layout(), files, out, LENGTH)[0]
    for words in ("no text for the expert b", "no text for the expert c", "has no expert z"):
        assert words in found["error"]
    assert not out.exists()


def test_an_expert_alone_is_a_dense_model():
    model = random_model(tokenizer(), 2)
    plan = forced(moe(tokenizer()), 2)
    assert plan.architecture == replace(model.architecture, experts=(), routing=None)
    name = "decoder.layers.1.mlp.linear_fc1.weight"
    assert torch.equal(plan.evaluate(name), copy(model, dtype=torch.float32).evaluate(name))


def _rows(experts="code math prose seed", layers=2, width=32, kind="centroids"):
    """As ``btx centroids`` writes them, of the tiny recipe's mixture by default."""
    return as_file(torch.zeros(layers, len(experts.split()), width), experts.split(), kind)


def _other(content):
    return save({"lm_head.weight": torch.zeros(4, 4), **content})


WRONG = {
    "no safetensors": (b"text, and no tensors", "not a safetensors file"),
    "a model": (_other({}), "holds no router rows: `btx centroids` did not write it"),
    "more than rows": (_other({"decoder.layers.0.mlp.router.weight/code": torch.zeros(32)}),
                       "holds no router rows"),
    "another expert": (_rows("code web prose seed"),
                       "experts code, prose, seed, web, and those mixed are code, math, prose"),
    "an expert less": (_rows("code prose seed"), "experts code, prose, seed, and those mixed"),
    "another depth": (_rows(layers=3), "of 3 layers, and the model has 2"),
    "another width": (_rows(width=64), "of shape [(64,)], and hidden_size is 32"),
    "another kind": (_rows(kind="ridge"), "rows of ridge, and router_init is centroids"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_of_other_rows_is_refused_before_anything_trains(name, tmp_path, capsys):
    """One error by the recipe's key, in a dry run; a plan warns of it."""
    content, words = WRONG[name]
    (tmp_path / "c.safetensors").write_bytes(content)
    recipe = tmp_path / "recipe.yaml"
    block = "mix: {router_init: centroids, centroids: c.safetensors}\nrun_dir: run\n"
    recipe.write_text(f"base: {TINY}\n{block}")
    assert main(["run", str(recipe), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") + said.count("fix: ") == 2
    assert "mix.centroids: " in said
    assert words in said
    assert main(["plan", str(recipe)]) == 0
    assert words in capsys.readouterr().err


def test_the_right_file_of_rows_passes(tmp_path, capsys):
    (tmp_path / "c.safetensors").write_bytes(_rows())
    recipe = tmp_path / "recipe.yaml"
    block = "mix: {router_init: centroids, centroids: c.safetensors}\nrun_dir: run\n"
    recipe.write_text(f"base: {TINY}\n{block}")
    assert main(["run", str(recipe), "--dry-run"]) == 0
    assert "mix.centroids" not in capsys.readouterr().err
