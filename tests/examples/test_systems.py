"""Every system of the paper from one base: what they share, and that matched means matched."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch

from megatron_btx.cli.main import main
from megatron_btx.data.mixture import StageData, stage_data
from megatron_btx.errors import UserError
from megatron_btx.evaluate import model_spec
from megatron_btx.families.export import export_hf
from megatron_btx.pipeline import graph, state
from megatron_btx.pipeline.slurm.attempt import begin
from megatron_btx.recipe import count
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.stages import btx_flops, training
from megatron_btx.report import comparison, comparison_page, comparison_tables
from megatron_btx.report.comparison import FinishedRun
from megatron_btx.report.page import write as write_page
from megatron_btx.train import metrics
from megatron_btx.weights.find_checkpoint import find_checkpoint
from megatron_btx.weights.megatron import open_megatron
from megatron_btx.weights.source import read_whole
from tests.examples.conftest import EXAMPLES, FILES, NAMES
from tests.examples.ranks_side import run_stage
from tests.ranks import Ranks

Systems = Mapping[str, FinishedRun]

OWN = {"dense": "dense", "upcycling": "upcycling", "btm": "btm", "btx": "btx"}
"""The row of a system's own, beside the seed's and the experts'."""


def results(run: FinishedRun) -> dict[str, dict]:
    content = json.loads((run.run_dir / "results.json").read_text())
    systems: dict[str, dict] = content["systems"]
    return systems


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_row(systems: Systems, name: str) -> None:
    run = systems[name]
    table = results(run)
    assert "seed" in table
    own = OWN.get(run.recipe.system)
    assert own is None or own in table
    for row in table.values():
        assert set(row["loss"]) == {"web", "math", "more", "mean"}
        assert all(math.isfinite(loss) for loss in row["loss"].values())
        assert row["train_flops"] == sum(stage["flops"] for stage in row["stages"].values())


def _has_own_experts(run: FinishedRun, stage: str) -> bool:
    """Whether a run's experts are not those of the others."""
    longer = run.recipe.system == "btm" and run.recipe.match != "data"
    anchored = any(expert.anchor for expert in run.recipe.experts.values())
    return stage.startswith("expert") and (longer or anchored)


def test_what_is_shared_is_trained_once(systems: Systems) -> None:
    """One attempt in all at the seed, at each expert that is neither lengthened nor anchored; its
    row is the same everywhere."""
    for stage in ("prepare", "seed", "expert-math", "expert-web", "expert-more"):
        places = {
            (run.run_dir / stage).resolve()
            for run in systems.values()
            if (run.run_dir / stage).exists() and not _has_own_experts(run, stage)
        }
        assert len(places) == 1
        lines = (places.pop() / "attempts.jsonl").read_text().splitlines()
        assert len(lines) == 1
    seeds = {json.dumps(results(run)["seed"]["loss"]) for run in systems.values()}
    assert len(seeds) == 1
    assert (systems["btx_top2"].run_dir / "seed").is_symlink()


def test_a_shared_stage_is_left_alone(systems: Systems, tmp_path: Path) -> None:
    """A run whose recipe changes lets go of the link; what is shared stays where it is."""
    run = systems["dense"]
    stages = tuple(stage for stage in graph.build(run.recipe) if stage.name in ("prepare", "seed"))
    assert set(state.link_shared(tmp_path, stages, [str(run.run_dir)])) == {"prepare", "seed"}
    assert not state.left(tmp_path, stages)
    real = (tmp_path / "seed").resolve()
    (tmp_path / "dense").mkdir()  # left by a start that came to nothing: it is not in the way
    assert state.link_shared(tmp_path, graph.build(run.recipe), [str(run.run_dir)]) == {}
    changed = state.Stage(name="seed", kind="seed", key="another")
    state.claim(tmp_path, changed)
    assert not (tmp_path / "seed").is_symlink()
    assert (real / "done.json").exists()
    assert not state.left(run.run_dir, stages)


def test_a_job_takes_what_is_shared(systems: Systems, tmp_path: Path) -> None:
    """Under Slurm its job finds nothing left to do."""
    shared = systems["dense"].run_dir
    recipe = dataclasses.replace(
        systems["dense"].recipe, run_dir=str(tmp_path), share=(str(shared.parent / "*"),)
    )
    attempt, _, directory = begin(recipe, "seed")
    assert attempt == 0
    assert directory.resolve() == (shared / "seed").resolve()


def _samples(stream: StageData, steps: Iterable[int]) -> list[bytes]:
    found = []
    for step in steps:
        for rank in range(stream.training.layout.data_parallel_size):
            for batch in stream.batches(step, rank):
                tokens = torch.cat([batch["tokens"], batch["labels"][:, -1:]], 1)
                rows = zip(batch["samples"].tolist(), tokens, strict=True)
                found += [(index, row.numpy().tobytes()) for index, row in rows]
    return [row for _, row in sorted(found)]


def _all(run: FinishedRun, stage: str) -> list[bytes]:
    steps = count.steps(training(run.recipe, stage), run.recipe.model)
    return _samples(stage_data(run.recipe, stage, run.run_dir), range(steps))


def test_matched_in_data(systems: Systems) -> None:
    """The experts' sequences together are, as a multiset, the dense run's first stage; the second
    is the finetuning's, in its order; upcycling sees the dense run's order."""
    btx = systems["btx_top2"]
    dense = _all(systems["dense"], "dense")
    assert dense == _all(systems["upcycling_dm"], "finetune")
    finetune = _all(btx, "finetune")
    assert dense[-len(finetune) :] == finetune
    experts = Counter(row for name in btx.recipe.experts for row in _all(btx, f"expert:{name}"))
    assert Counter(dense[: -len(finetune)]) == experts
    for name in NAMES:
        run = systems[name]
        if run.recipe.system == "btx" and run.recipe.match == "data":
            assert _all(run, "finetune") == finetune


def test_the_finetuning_reads_one_file_of_sample_ids(systems: Systems) -> None:
    """The indices that Megatron built for it are the same files, byte for byte."""

    def files(name: str, stage: str) -> Counter[tuple[str, bytes]]:
        found = (systems[name].run_dir / stage / "index").rglob("*.npy")
        return Counter((path.name.partition("-")[2], path.read_bytes()) for path in found)

    ours = files("btx_top2", "finetune")
    assert ours
    assert files("btx_soft", "finetune") == ours
    for other in (files("dense", "dense"), files("upcycling_dm", "finetune")):
        assert ours <= other


@pytest.mark.parametrize(
    "name", ["dense_cm", "btm_posterior_cm", "upcycling_cm", "upcycling_drop", "btx_sample_top1"]
)
def test_matched_in_compute(systems: Systems, name: str) -> None:
    run = systems[name]
    row = results(run)[run.recipe.system]
    reference = results(systems["btx_top2"])["btx"]["train_flops"]
    assert row["train_flops"] == pytest.approx(reference, rel=0.01)
    assert btx_flops(run.recipe) == pytest.approx(reference, rel=0.01)


TAKEN = """
base: {base}
name: taken
run_dir: {run}
system: btm
btm: {{method: posterior}}
experts:
  math: {{from: {math}, tokens: 0}}
  web: {{from: {web}, tokens: 0}}
  more: {{tokens: 0}}
"""


def test_what_is_taken_says_what_it_was_trained_on(
    systems: Systems, ranks: Ranks, tmp_path: Path
) -> None:
    """Its manifest does; a Hugging Face model does not, so of it and of what is made of it nothing
    is claimed; an expert of no tokens is the seed."""
    shared = systems["btx_top2"]
    export_hf(find_checkpoint(shared.run_dir / "expert-web"), tmp_path / "hf")
    file = tmp_path / "recipe.yaml"
    base, math = shared.run_dir.parents[1] / "base.yaml", shared.run_dir / "expert-math"
    run_dir = tmp_path / "run"
    file.write_text(TAKEN.format(base=base, run=run_dir, math=math, web=tmp_path / "hf"))
    recipe = load_recipe(file)
    run_dir.mkdir()
    stages = tuple(stage for stage in graph.build(recipe) if stage.kind != "report")
    state.link_shared(run_dir, stages, [str(shared.run_dir)])
    for stage in state.left(run_dir, stages):
        assert ranks.run(run_stage, 1, str(file), stage.name) == [0]
    taken = FinishedRun(recipe=recipe, run_dir=run_dir)
    table, theirs = results(taken), results(shared)
    for key in ("train_tokens", "train_flops"):
        assert table["expert:math"][key] == theirs["expert:math"][key] > 0
        assert table["expert:more"][key] == 0
        assert table["expert:web"][key] is None
        assert table["btm"][key] is None
    assert table["btm"]["stages"]["expert:math"] == theirs["btx"]["stages"]["expert:math"]
    made = comparison.compare([taken])
    rows = {row[0]: row[len(made.columns) + 1 :] for row in comparison_tables.cells(made)}
    assert rows["taken"][:3] == ["?", "?", "-"]
    assert "What was taken as web expert does not say how many tokens" in comparison_tables.plain(
        made
    )
    assert json.loads(comparison_tables.as_json(made))["systems"]["taken"]["train_tokens"] is None
    assert "<svg" in comparison_page.render(made, "taken")


def test_an_evaluation_names_how_experts_are_taken(systems: Systems) -> None:
    """Of Sample Top-1, and of no other."""
    choices = {name: results(run).get("btx", {}).get("expert_choice") for name, run in
               systems.items()}  # fmt: skip
    assert {name for name, choice in choices.items() if choice} == {"btx_sample_top1"}
    assert choices["btx_sample_top1"] == "drawn"
    said = comparison_tables.notes(comparison.compare([systems["btx_sample_top1"]]))
    assert "btx_sample_top1: one expert a token, drawn with seeded noise." in said


def test_frozen_experts_stay_as_they_are(systems: Systems) -> None:
    """To the bit, weight decay included; all else has learned."""
    run = systems["btx_frozen"]
    mixed = open_megatron(find_checkpoint(run.run_dir / "finetune"), "mixed").source
    models = [*run.recipe.experts, "seed"]
    for expert, model in enumerate(models):
        directory = run.run_dir / ("seed" if model == "seed" else f"expert-{model}")
        dense = open_megatron(find_checkpoint(directory), model).source
        for layer in range(run.recipe.model.num_layers):
            for matrix in ("linear_fc1", "linear_fc2"):
                there = f"decoder.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"
                here = f"decoder.layers.{layer}.mlp.{matrix}.weight"
                assert torch.equal(read_whole(mixed, there), read_whole(dense, here))
    free = open_megatron(find_checkpoint(systems["btx_no_balance"].run_dir / "finetune"), "free")
    name = "decoder.layers.0.mlp.experts.0.linear_fc1.weight"
    assert not torch.equal(read_whole(mixed, name), read_whole(free.source, name))
    proj = "decoder.layers.0.self_attention.linear_proj.weight"
    seed = open_megatron(find_checkpoint(run.run_dir / "seed"), "seed").source
    assert not torch.equal(read_whole(mixed, proj), read_whole(seed, proj))


@pytest.mark.parametrize("name", ["flexolmo", "bar"])
def test_anchored_branches(systems: Systems, name: str) -> None:
    """The anchor and all shared layers that were frozen are the seed's, in the branches and in what
    became of them; the experts are the branches' own, and the routers alone were trained."""
    run = systems[name]
    seed = open_megatron(find_checkpoint(run.run_dir / "seed"), "seed").source
    made = open_megatron(find_checkpoint(run.run_dir / "finetune"), "made").source
    layer = "decoder.layers.0."
    for place, expert in enumerate(run.recipe.experts):
        model = open_megatron(find_checkpoint(run.run_dir / f"expert-{expert}"), expert)
        assert model.architecture.experts == (expert, "seed")
        assert model.manifest["anchor"] == "seed"
        for matrix in ("linear_fc1", "linear_fc2"):
            anchor = read_whole(model.source, f"{layer}mlp.experts.1.{matrix}.weight")
            assert torch.equal(anchor, read_whole(seed, f"{layer}mlp.{matrix}.weight"))
            own = read_whole(model.source, f"{layer}mlp.experts.0.{matrix}.weight")
            assert not torch.equal(own, anchor)
            there = read_whole(made, f"{layer}mlp.experts.{place}.{matrix}.weight")
            assert torch.equal(there, own)
        router = f"{layer}mlp.router.weight"
        begun = read_whole(model.source, router)[0]
        assert not torch.equal(read_whole(made, router)[place], begun)
        proj = f"{layer}self_attention.linear_proj.weight"
        for one in (model.source, made):
            assert torch.equal(read_whole(one, proj), read_whole(seed, proj))
        embedding = "embedding.word_embeddings.weight"
        same = torch.equal(read_whole(model.source, embedding), read_whole(seed, embedding))
        assert same == (name == "flexolmo")


def _measured(run: FinishedRun, *stages: str) -> float:
    """Rank-seconds of the stages' training steps; the finetuning has two ranks."""
    total = 0.0
    for stage in stages:
        log = (run.run_dir / stage / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, log) if record["kind"] == "train"]
        seconds = sum(step["time_metrics/end_to_end(s)"] for step in steps)
        total += seconds * (2 if stage == "finetune" else 1)
    return total


def test_the_comparison(systems: Systems, tmp_path: Path) -> None:
    made = comparison.compare(list(systems.values()))
    names = [system.name for system in made.systems]
    assert names[:4] == ["seed", "expert:math", "expert:web", "expert:more"]
    assert set(NAMES) - {"experts"} <= set(names)
    assert "btm_posterior_cm expert:math" in names  # trained for longer than the others'
    assert len(names) == len(set(names))
    assert made.columns == ("web", "math", "more", "mean")
    by_name = {system.name: system for system in made.systems}
    scores = by_name["btx_top2"].loss
    assert scores["mean"] == pytest.approx((scores["web"] + scores["math"] + scores["more"]) / 3)
    assert by_name["upcycling_cm"].result.moe_share == 1.0
    assert 0 < by_name["btx_top2"].result.moe_share < 1
    assert (
        by_name["btm_top2"].result.inference_flops_per_token
        == 2 * by_name["dense"].result.inference_flops_per_token
    )
    assert by_name["btx_frozen"].result.train_flops < by_name["btx_no_balance"].result.train_flops
    text = comparison_tables.markdown(made, ["dense"])
    assert all(f"| {name} |" in text for name in names)
    stages = ("expert-math", "expert-web", "expert-more", "finetune")
    measured = _measured(systems["btx_top2"], *stages)
    assert by_name["btx_top2"].seconds == {1234: pytest.approx(measured)}
    assert json.loads(comparison_tables.as_json(made))["best"] == made.best
    page = comparison_page.render(made, "test")
    assert all(name in page for name in names)


def test_the_routing_of_a_stage_on_its_own_runs_text(
    systems: Systems, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without --data: the shares that the run's evaluation has measured."""
    run = systems["btx_top2"]
    assert main(["routing", str(run.run_dir / "finetune"), "--json"]) == 0
    (view,) = json.loads(capfd.readouterr().out)
    wanted = results(run)["btx"]
    for measure in ("load", "gate"):
        for domain, matrix in wanted[measure].items():
            found = torch.tensor(view[measure][domain])
            torch.testing.assert_close(found, torch.tensor(matrix), atol=2e-3, rtol=0)


def test_speed_is_logged_under_the_fields_names(systems: Systems) -> None:
    """MFU times the peak is FLOP/s, those are the FLOPs of a token times tokens/s, and a step's
    parts are within it; an MoE logs how evenly its experts are used."""
    records = metrics.read(systems["btx_top2"].run_dir / "finetune" / "metrics.jsonl")
    (start,) = (record for record in records if record["kind"] == "start")
    assert (start["world_size"], start["peak_tflops"]) == (2, 0.05)
    steps = [record for record in records if record["kind"] == "train"]
    architecture = open_megatron(
        find_checkpoint(systems["btx_top2"].run_dir / "finetune"), "btx"
    ).architecture
    assert start["flops_per_token"] == count.training_flops_per_token(architecture)
    for record in steps:
        speed = {name: record[f"throughput/device/{name}"] for name in ("TPS", "MFU", "flopsPS")}
        assert speed["MFU"] * 0.05e12 == pytest.approx(speed["flopsPS"])
        assert speed["flopsPS"] == pytest.approx(speed["TPS"] * start["flops_per_token"])
        assert speed["TPS"] == pytest.approx(record["tokens_per_second"] / 2)
        parts = [record[f"time_metrics/{part}(s)"] for part in ("data_loading",
                 "forward_backward", "optimizer")]  # fmt: skip
        assert all(part > 0 for part in parts)
        assert sum(parts) <= record["time_metrics/end_to_end(s)"]
        assert record["memory/max_resident(GiB)"] > 0.1
    (save,) = (record for record in records if record["kind"] == "save")
    seconds, size = (save[f"train/checkpoint_save_{key}"] for key in ("duration_s", "GB"))
    assert save["train/checkpoint_save_GBps"] == pytest.approx(size / seconds)
    for record in records:
        if record["kind"] == "eval":
            assert record["time_metrics/evaluation(s)"] > 0
            assert 1 / 4 <= record["moe/expert_diversity_mean"] <= 1
            assert set(record["moe"]) == set(record["load"])


def test_the_command(systems: Systems, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs what is left (the pages) and prints the table; asked again, it runs nothing."""
    base = systems["seed"].run_dir.parents[1] / "base.yaml"
    arguments = ["compare", str(EXAMPLES / "systems"), "--base", str(base), "--out", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr()
    assert "btx_top2" in first.out
    assert "* the best of its column" in first.out
    assert (systems["btm_top1"].run_dir / "report.html").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "compare.md", "compare.json", "compare.html",
    }  # fmt: skip
    assert main([*arguments, "--json"]) == 0
    again = capsys.readouterr()
    assert again.err == ""
    assert json.loads(again.out) == json.loads((tmp_path / "compare.json").read_text())
    assert main([*arguments, "--dry-run"]) == 0
    assert "not started" not in capsys.readouterr().out
    # Of a base that shares with them, what lies in their directories is taken, and said.
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {base}\nrun_dir: {tmp_path}/{{name}}\nshare: {base.parent}/runs/*\n")
    dense = ["compare", str(FILES["dense"]), "--base", str(other), "--dry-run"]
    assert main(dense) == 0
    out = capsys.readouterr().out
    assert re.search(
        "prepare from .*/prepare, seed from .*, dense from .*, evaluate not started", out
    )


@pytest.mark.parametrize("name", ["upcycling_cm", "btx_split_top2", "btx_top2"])
def test_the_page_of_a_run_on_its_way(systems: Systems, name: str, tmp_path: Path) -> None:
    """Routing is told under the names of the experts, before the final evaluation too."""
    run, copied = systems[name], tmp_path / "run"
    nothing = shutil.ignore_patterns("checkpoints", "results.json", "report.html")
    shutil.copytree(run.run_dir, copied, ignore=nothing)
    page = write_page(run.recipe, copied).read_text()
    assert "most choices go on" in page
    assert all(expert in page for expert in run.recipe.expert_names)


def test_scores_on_tasks(
    systems: Systems, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Measured by ranks of their own, and kept: asked again, nothing is measured."""
    choices = {"text": ["up", "down"], "label": ["A", "B"]}
    items = [{"question": f"Which {n}?", "choices": choices, "answerKey": "A"} for n in range(4)]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(item) for item in items))
    base = systems["seed"].run_dir.parents[1] / "base.yaml"
    arguments = ["compare", str(EXAMPLES / "systems" / "seed.yaml"), "--base", str(base)]
    arguments += ["--out", str(tmp_path / "out"), "--tasks", f"arc_easy={tmp_path / 'items.jsonl'}"]
    assert main(arguments) == 0
    first = capfd.readouterr()
    assert "arc_easy: acc, 0 shots, 4 items" in first.out
    assert "seed: tasks" in first.err
    assert main(arguments) == 0
    again = capfd.readouterr()
    assert again.out == first.out
    assert again.err == ""
    told = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert told["tasks"]["seed"]["tasks"]["arc_easy"]["items"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}"], "has no recipe in it"),
        (["{recipe}", "{recipe}"], "is named twice"),
        (["{recipe}", "{hf}", "--dry-run"], "fix: compare recipes with the same domains"),
        (["{recipe}", "--seeds", "0"], "give at least 1"),
        (["{recipe}", "--seeds", "2"], "is made anew for each random seed"),
        (["{recipe}", "--tasks", "arc_easy={tmp}/none.jsonl"], "none.jsonl does not exist"),
        (["{recipe}", "--base", "{tmp}/none.yaml"], "none.yaml"),
        (["{recipe}", "--out", "{recipe}"], "dense.yaml: is not a directory"),
        (["{recipe}", "--limit", "0"], "--limit: is 0"),
        (["{recipe}", "--against", "dense_cm"], "--against dense_cm: there is no such system"),
    ],
)
def test_bad_comparisons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    recipe = EXAMPLES / "systems" / "dense.yaml"
    other = EXAMPLES / "from_huggingface" / "recipe.yaml"
    given = [text.format(tmp=tmp_path, recipe=recipe, hf=other) for text in arguments]
    assert main(["compare", *given]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_set_is_what_its_run_mixes(systems: Systems) -> None:
    """``btm:RUN_DIR``; an average of weights is no set, and a copied seed is alone."""
    (found,) = model_spec.parse([f"btm:{systems['btm_top1'].run_dir}"])
    assert (list(found.models), found.method) == (["math", "web", "more", "seed"], "top1")
    for name, words in (("btm_average", "one model"), ("upcycling_dm", "mixes seed alone")):
        with pytest.raises(UserError, match=words):
            model_spec.parse([f"btm:{systems[name].run_dir}"])
