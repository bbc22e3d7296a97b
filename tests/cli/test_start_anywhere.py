"""A run that takes a seed and an expert from another run instead of training them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.families import open_hf
from megatron_btx.recipe.load import dump, load_recipe, parse_recipe
from megatron_btx.recipe.schema import BTM, Layout
from megatron_btx.train.metrics import read
from megatron_btx.weights.claimed_directory import claimed
from megatron_btx.weights.file_hashes import files_of, hashes_of
from megatron_btx.weights.source import read_whole
from tests.ranks import Ranks
from tests.small import Exported, btx


def test_the_imported_seed_computes_what_it_computed(exported: Exported, taken: Path) -> None:
    theirs = {
        stage: [r for r in read(exported.run_dir / stage / "metrics.jsonl") if r["kind"] == "eval"]
        for stage in ("seed", "expert-math")
    }
    ours = json.loads((taken / "results.json").read_text())["systems"]
    for stage, system in (("seed", "seed"), ("expert-math", "expert:math")):
        # Both fp32; under TP2 the sums are made in another order.
        assert ours[system]["loss"] == pytest.approx(theirs[stage][-1]["loss"], abs=1e-5)
    assert ours["btx"]["loss"]["mean"] < ours["seed"]["loss"]["mean"]


def test_their_tokenizer_comes_along(exported: Exported, taken: Path) -> None:
    model = "prepare/tokenizer/tokenizer.model"
    assert (taken / model).read_bytes() == (exported.run_dir / model).read_bytes()


def test_the_plan_knows_their_vocabulary(taken: Path) -> None:
    recipe = load_recipe(taken.parent.parent / "recipe.yaml")
    manifest = json.loads(next(taken.glob("seed/checkpoints/*/manifest.json")).read_text())
    assert recipe.tokenizer.vocab_size == manifest["vocab_size"] == 400


def test_nothing_is_trained_or_copied(exported: Exported, taken: Path) -> None:
    for stage in ("seed", "expert-math"):
        assert not (taken / stage / "metrics.jsonl").exists()
        (link,) = (taken / stage / "checkpoints").iterdir()
        assert link.is_symlink()
        assert link.resolve().parent.parent == exported.run_dir.resolve() / stage
    lineage = json.loads(
        next((taken / "finetune" / "checkpoints").glob("*/manifest.json")).read_text()
    )["lineage"]
    assert len(lineage["sources"]) == 2


def test_again_all_is_done(taken: Path, tmp_path: Path) -> None:
    again = shutil.copytree(taken.parent.parent, tmp_path / "again", symlinks=True)
    done = btx("run", "recipe.yaml", cwd=again)
    assert done.returncode == 0
    assert "stages are done" in done.stdout


def test_every_finished_model_goes_out_with_its_card(
    taken: Path, tmp_path: Path, ranks: Ranks
) -> None:
    """The MoE by the command; an expert and an average as its ranks make them."""
    hub, _ = pytest.importorskip("huggingface_hub"), pytest.importorskip("transformers")
    done = btx("export", taken, "--out", "moe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 claims hold" in done.stdout
    card = hub.ModelCard.load(tmp_path / "moe" / "README.md").text
    results = json.loads((taken / "results.json").read_text())["systems"]
    for name, system in results.items():
        for loss in system["loss"].values():
            assert f"{loss:.3f}" in card, name
    assert f"{results['btx']['train_tokens']:,}" in card
    assert "![routing](routing.svg)" in card
    assert (tmp_path / "moe" / "routing.svg").read_text().startswith("<svg")
    claims = json.loads((tmp_path / "moe" / "verification.json").read_text())["claims"]
    assert claims[0]["figure"]["different"] == 0
    assert claims[-1]["figure"]["difference"] < 1e-4
    assert set(hashes_of(tmp_path / "moe")) == set(files_of(tmp_path / "moe"))
    assert main(["export", str(taken), "--out", str(tmp_path / "moe")]) == 2

    averaged = tmp_path / "averaged"
    shutil.copytree(taken, averaged, symlinks=True, ignore=shutil.ignore_patterns("evaluate"))
    recipe = parse_recipe((averaged / "recipe.yaml").read_text(), averaged / "recipe.yaml")
    ensemble = replace(recipe, system="btm", btm=BTM(method="average"), name="averaged")
    (averaged / "recipe.yaml").write_text(dump(ensemble))
    for run_dir, stage in ((taken, "expert:math"), (averaged, "btm")):
        out = tmp_path / stage.replace(":", "-")
        (found,) = ranks.run(export_here, 1, run_dir, stage, out)
        assert len(found["claims"]) == 4
    one, other = (read_whole(open_hf(tmp_path / n, n).source, NORM) for n in ("btm", "expert-math"))
    assert not torch.equal(one, other)


def test_what_cannot_go_out_is_told(
    taken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ([str(tmp_path), "--out", str(tmp_path / "x")], "is no run"),
        ([str(taken), "--out", str(tmp_path / "x"), "--stage", "prose"], "this run has no such"),
        ([str(taken), "--out", str(tmp_path / "y" / "x")], "no such directory"),
    ):
        assert main(["export", *words]) == 2
        assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    run_dir = tmp_path / "run"
    shutil.copytree(taken, run_dir, symlinks=True)
    (run_dir / "finetune" / "done.json").rename(run_dir / "finetune" / "stopped.json")
    assert main(["export", str(run_dir), "--out", str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    assert "error: finetune: is stopped: goes on from step_" in told
    assert f"finish it first: btx run {run_dir}" in told
    shutil.rmtree(run_dir)
    with claimed(tmp_path / "x", "another"):
        assert main(["export", str(taken), "--out", str(tmp_path / "x")]) == 2
        assert f"written by another process: pid {os.getpid()} on" in capsys.readouterr().err


NORM = "decoder.final_layernorm.weight"


def export_here(run_dir: Path, stage: str, out: Path) -> dict[str, Any]:
    from megatron_btx.engine import distributed
    from megatron_btx.evaluate.export import export_model

    distributed.initialize(Layout(), 0)
    return export_model(run_dir, stage, out, check=True)
