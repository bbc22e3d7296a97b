"""What ``btx mix`` refuses: one clear error for each mistake, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_btx.cli import mix
from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.mix.plans import misfits
from megatron_btx.weights.source import read_whole
from tests.mix.commands import btx, named, parsed, save
from tests.weights.models import dense
from tests.weights.test_directories import tree_hash


def test_nan_and_infinity_are_found_by_name(sources, tmp_path):
    bad = dense("math", 1)
    tensors = {n: read_whole(bad.source, n).clone() for n in bad.tensors}
    tensors["decoder.layers.1.mlp.linear_fc2.weight"][3, 4] = float("nan")
    tensors["output_layer.weight"][0, 0] = float("inf")
    from megatron_btx.weights.source import MemorySource

    save_raw = replace(bad, source=MemorySource(tensors))
    with pytest.raises(UserError, match="holds NaN or infinity"):
        save(save_raw, tmp_path / "never", "hf")
    from safetensors.torch import load_file, save_file

    save(bad, tmp_path / "bad", "hf")
    path = tmp_path / "bad" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    stored["lm_head.weight"][0, 0] = float("inf")
    save_file(stored, path)
    with pytest.raises(UserError) as caught:
        btx(
            "mix",
            "--sources",
            named(sources)[0],
            f"math={tmp_path / 'bad'}",
            "--out",
            tmp_path / "o",
        )
    text = str(caught.value)
    assert "math: tensor model.layers.1.mlp.down_proj.weight holds NaN" in text
    assert "math: tensor lm_head.weight holds NaN or infinity" in text
    assert "code:" not in text
    assert sorted(os.listdir(tmp_path)) == ["bad"]


def test_all_that_is_wrong_is_told_at_once_with_exit_code_2(sources, tmp_path, capsys):
    """Sources, models that differ, the request and the result's place; nothing is written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copytree(sources / "hf" / "code", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "model.bin")
    shutil.copytree(sources / "megatron" / "math", tmp_path / "cut")
    part = tmp_path / "cut" / "__0_1.distcp"
    part.write_bytes(part.read_bytes()[:-9])
    (tmp_path / "cut" / "__0_0.distcp").unlink()
    shutil.copytree(sources / "hf" / "prose", tmp_path / "stretched")
    config = tmp_path / "stretched" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_theta": 5e5}))
    before = tree_hash(tmp_path)
    words = ["mix", "--out", tmp_path / "out", "--shard", "big", "--memory", "some"]
    words += ["--noise", "0.1", "--router-init", "centroids", "--sources"]
    words += [sources / "hf" / "seed", *(tmp_path / n for n in ("stretched", "pickled", "cut"))]
    assert main([str(word) for word in [*words, tmp_path / "empty"]]) == 2
    text = capsys.readouterr().err
    for found in (
        "out: exists already",
        "--shard: 'big' is not a size",
        "--memory: 'some' is not a size",
        "--noise: has no meaning for method btx",
        "--router-init: is centroids, and needs the file",
        "rotary_base is 500000.0, that of seed is 10000.0",
        "model.bin: a pickle, which can run any code",
        "__0_1.distcp: truncated",
        "__0_0.distcp: missing",
        "empty: not a checkpoint",
    ):
        assert found in text, found
    assert tree_hash(tmp_path) == before


def test_what_is_wrong_with_every_source_is_told_at_once(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    for stage in ("seed", "expert-code", "finetune"):
        (run / stage / "checkpoints" / "step_00000002").mkdir(parents=True)
    (run / "recipe.yaml").touch()
    (tmp_path / "bad.yaml").write_text("workers: many\n")
    before = tree_hash(tmp_path)
    with pytest.raises(UserError) as caught:
        btx("mix", "--sources", tmp_path / "empty", tmp_path / "none", "--out", tmp_path / "out")
    assert "empty: not a checkpoint" in str(caught.value)
    assert "none: does not exist" in str(caught.value)
    cases = [
        (["--sources", named(sources)[0], named(sources)[0]], "given twice"),
        (["--sources", *named(sources), "--average", "code"], "NAME=WEIGHT"),
        (["--sources", *named(sources), "--dare", "0.5", "--seed-model", "z"], "no model z"),
        (["--method", "upcycle", "--sources", *named(sources)], "takes 1 source"),
        (["--method", "blend", "--sources", *named(sources)[:2], "--memory", "1MiB"], "too little"),
        (["--sources", *named(sources), "--memory", "much"], "not a size"),
        (["--sources", sources / "hf"], "not a checkpoint"),
        (
            ["--sources", *named(sources), "--noise", "0.1"],
            "--noise: has no meaning for method btx",
        ),
        (
            ["--sources", *named(sources), "--moe-router-topk", "5"],
            "--moe-router-topk: a token cannot take 5 of 4 experts",
        ),
        (
            ["--sources", *named(sources), "--router-init", "branches"],
            "^--router-init: is branches, and code, math, prose, seed are none\n  fix: .*other$",
        ),
        (["--sources", *named(sources), "--dare", "0.5", "--ties", "0.5"], "--ties: stands beside"),
        (["--sources", *named(sources), "--average", "a=1"], "--average: weights for a; the mix"),
        (
            ["--sources", *named(sources), "--average-groups", "ffn:code=1"],
            "--average-groups ffn: there is no group ffn",
        ),
        (
            ["--method", "blend", "--sources", *named(sources)[:1], "--num-chunks", 5],
            "--num-chunks",
        ),
        (
            ["--method", "split", "--sources", *named(sources), "--num-chunks", 5],
            "^--num-chunks: an",
        ),
        (["--method", "split", "--sources", *named(sources)], "^--num-chunks: is 1, and split"),
        (
            ["--method", "split", "--num-chunks", 2, "--scale", "cube_root"]
            + ["--sources", *named(sources)],
            "^--scale: cube_root is for upcycle",
        ),
        (
            ["--method", "upcycle", "--num-chunks", 4, "--sources", named(sources)[0]],
            "^--moe-router-topk: top-2 of virtual groups of 4 chunks takes part of a group",
        ),
        (["--sources", *named(sources), "--family", "nonesuch"], "nonesuch: is no known family"),
        (
            ["--sources", *named(sources), "--family", "nonesuch", "--dry-run"],
            "nonesuch: is no known family",
        ),
        (
            ["--method", "average", "--fused", "--sources", *named(sources)],
            "--fused: the result has no experts to stack",
        ),
        (["--sources", f"seed={run}"], f"such as {run}/seed$"),
        (["--sources", f"code={run}"], f"such as {run}/expert-code$"),
        (["--method", "drop", "--sources", run], "checkpoints are in expert-code, finetune"),
        (["--report", "--sources", *named(sources), "--out", __file__], "is not a directory"),
    ]
    for words, found in cases:
        with pytest.raises(UserError, match=found):
            btx("mix", "--out", tmp_path / "out", *words)
    with pytest.raises(UserError, match="--sources missing"):
        btx("mix", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="(?s)workers: .*--sources and --out missing"):
        btx("mix", "--config", tmp_path / "bad.yaml")
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(("form", "payload"), [("megatron", "*.distcp"), ("hf", "*.safetensors")])
def test_a_truncated_source(sources, tmp_path, capsys, form, payload):
    """Cut in the middle of a file of weights: the file is named."""
    shutil.copytree(sources / form / "math", tmp_path / "math")
    file = max((tmp_path / "math").glob(payload), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    before = tree_hash(tmp_path)
    words = ["mix", "--sources", f"code={sources / form / 'code'}", f"math={tmp_path / 'math'}"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert f"{file}: truncated: " in capsys.readouterr().err
    assert tree_hash(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--method append --moe-router-topk 3", "--moe-router-topk: has no meaning for method app"),
        ("--method drop --moe-router-topk 3", "--moe-router-topk: has no meaning for method drop"),
        ("--method replace --moe-router-topk 3", "--moe-router-topk: has no meaning for method re"),
        ("--method copy --moe-router-topk 3", "--moe-router-topk: has no meaning for method copy"),
        ("--method average --moe-router-topk 3", "--moe-router-topk: has no meaning for method av"),
        ("--method average --expert code", "--expert: has no meaning for method average"),
        ("--expert code", "--expert: has no meaning for method btx"),
        ("--format megatron --fused", "--fused: has no meaning for format megatron"),
        ("--format megatron --family mixtral", "--family: has no meaning for format megatron"),
    ],
)
def test_an_option_that_nothing_looks_at_is_refused(words, found):
    options = parsed("mix", "--sources", "a", "b", "--out", "o", *words.split())
    request = mix.request_of(options, "btx mix", ("sources", "out"))
    assert found in "\n".join(map(str, misfits(request)))


@pytest.mark.parametrize(
    "words", ["a", "a --moe-router-topk 1", "a b --base b", "a --method blend"]
)
def test_an_expert_alone_is_told_what_to_do(words):
    """Not how many experts a token may take: no number of them would do."""
    request = mix.request_of(
        parsed("mix", "--out", "o", "--sources", *words.split()), "btx mix", ("sources", "out")
    )
    assert "--sources" in (said := "\n".join(map(str, misfits(request))))
    assert "give two or more sources, or --method upcycle" in said


RANGES = {
    "--moe-router-topk 0": "is 0, out of range\n  fix: give at least 1",
    "--dare 2": "is 2.0, out of range\n  fix: give 0 to 0.999",
    "--dare -1": "is -1.0, out of range",
    "--dare nan": "is nan, not a number",
    "--router-init-std -1": "is -1.0, out of range",
    "--random-seed -1": "is -1, out of range",
    "--copies 0": "is 0, out of range\n  fix: give at least 1",
    "--num-chunks 0": "is 0, out of range",
    "--drop-ratio 3": "is 3.0, out of range",
    "--noise -3": "is -3.0, out of range",
    "--workers 0": "is 0, out of range",
    "--shard 0": "'0' is not a size",
    "--shard inf": "'inf' is not a size",
    "--average code=-1 math=2 prose=1 seed=1": "the weight -1.0 is negative",
    "--average code=0 math=0 prose=0 seed=0": "every weight is zero",
    "--average code=nan math=0 prose=0 seed=0": "is not NAME=WEIGHT",
    "--average code=1 code=1 math=1 prose=0 seed=0": "each name once",
    "--average-groups norms:code=1 norms:math=-2": "the weight -2.0 is negative",
}


@pytest.mark.parametrize("options", RANGES)
def test_numbers_are_refused_as_a_recipe_refuses_them(sources, tmp_path, capsys, options):
    flag, *values = options.split()
    words = ["--sources", *named(sources)]
    if flag in ("--copies", "--num-chunks", "--drop-ratio", "--noise"):
        words = ["--sources", named(sources)[0], "--method", "upcycle"]
    assert main(["mix", *words, "--out", str(tmp_path / "out"), flag, *values]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag}")
    assert RANGES[options] in said
    assert said.count(" fix: ") == 1, "of each mistake one error"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_fp64_goes_in_and_not_out(tmp_path, capsys, form):
    save(dense("a", 1), tmp_path / "a", "hf", dtype=torch.float64)
    words = ["mix", "--method", "copy", "--sources", str(tmp_path / "a"), "--format", form]
    words += ["--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "error: --dtype: the sources are torch.float64" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a"]
    assert main([*words, "--dtype", "fp32"]) == 0


@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_a_result_that_nobody_computes_is_not_written(sources, tmp_path, form):
    words = ["--sources", *named(sources), "--format", form, "--moe-router-topk", 1]
    for dry in ([], ["--dry-run"]):
        with pytest.raises(UserError, match="softmax over one") as caught:
            btx("mix", *words, "--out", tmp_path / "out", *dry)
        assert "--moe-router-topk" in str(caught.value)
    assert not list(tmp_path.iterdir())
