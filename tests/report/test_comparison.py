"""What the comparison sets side by side, and what it refuses to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.evaluate.results import SystemResult
from megatron_btx.report import comparison, comparison_figures, comparison_tables, figure_files
from megatron_btx.report.comparison import Comparison, FinishedRun, System
from megatron_btx.report.comparison_figures import frontier
from megatron_btx.report.paired_differences import Paired, student_t
from megatron_btx.train import goodput
from tests.report.made import DEMO, FINAL, make_run


def two(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> list[FinishedRun]:
    """Two runs of one recipe; the second one's results.json is changed."""
    runs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        recipe, run_dir = make_run(tmp_path / name)
        runs.append(FinishedRun(recipe=recipe, run_dir=run_dir))
    path = runs[1].run_dir / "results.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return runs


def test_losses_of_the_same_text(tmp_path: Path) -> None:
    made = comparison.compare(two(tmp_path, lambda results: None))
    assert made.columns == ("general", "code", "math", "prose", "mean")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["text"]["code"].update(tokens=61440), r"other text of code \(61,440 tokens\)"),
        (
            lambda r: r["text"]["math"].update(sha256="f" * 64),
            "was evaluated on other text of math",
        ),
        (lambda r: r.pop("text"), "does not say which held-out text"),
        (lambda r: r["domains"].reverse(), "compare recipes with the same domains"),
    ],
)
def test_losses_of_other_text_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        comparison.compare(two(tmp_path, change))


def test_losses_by_random_seed_are_one_row(tmp_path: Path) -> None:
    """What each run says, and beside it the mean; ``compare.json`` holds every loss unrounded."""
    runs = two(tmp_path, lambda results: results["systems"]["btx"]["loss"].update(mean=2.5))
    other = dataclasses.replace(runs[1].recipe, random_seed=1235)
    made = comparison.compare([runs[0], dataclasses.replace(runs[1], recipe=other)])
    btx = made.named(runs[0].recipe.name)
    first = sum(FINAL["btx"].values()) / 4
    assert {seed: loss["mean"] for seed, loss in btx.losses.items()} == {1234: first, 1235: 2.5}
    assert btx.loss["mean"] == pytest.approx((first + 2.5) / 2)
    assert btx.spread["mean"] == pytest.approx(abs(first - 2.5) / math.sqrt(2))
    told = json.loads(comparison_tables.as_json(made))["systems"][btx.name]
    assert told["losses"] == {"1234": {**FINAL["btx"], "mean": first},
                              "1235": {**FINAL["btx"], "mean": 2.5}}  # fmt: skip


LOSSES = {
    "seed": {"math": (3.0, 3.1, 3.2), "mean": (3.0, 3.1, 3.2)},
    "expert:math": {"math": (2.0, 2.1, 2.0), "mean": (3.0, 3.0, 3.0)},
    "dense": {"math": (2.5, 2.6, 2.6), "mean": (2.50, 2.60, 2.63)},
    "moe": {"math": (2.3, 2.3, 2.3), "mean": (2.44, 2.52, 2.55)},
    "other": {"math": (2.3, 2.3, 2.3), "mean": (2.45, 2.51, 2.56)},
}
KINDS = {"seed": "seed", "expert:math": "experts", "dense": "dense"}
FLOPS = {"seed": 900, "expert:math": 40, "dense": 50, "moe": 100, "other": 80}


@pytest.fixture
def three() -> Comparison:
    """Five systems under three random seeds."""
    systems = [
        System(
            name=name,
            system=KINDS.get(name, "btx"),
            result=SystemResult(
                name=name, loss={}, train_flops=FLOPS[name], inference_flops_per_token=7
            ),
            losses={
                seed: {column: loss[place] for column, loss in columns.items()}
                for place, seed in enumerate((1, 2, 3))
            },
        )
        for name, columns in LOSSES.items()
    ]
    best = {"math": "expert:math", "mean": "moe"}
    return Comparison(columns=("math", "mean"), systems=tuple(systems), best=best)


def test_differences_are_paired_by_random_seed(three: Comparison) -> None:
    """The seeds differ by 0.1, the two systems under one seed by 0.06 to 0.08: -0.06, -0.08, -0.08
    have the mean -0.22 / 3, the standard deviation sqrt(4 / 3) / 100 and t = 4.3027."""
    moe, dense, other = three.named("moe"), three.named("dense"), three.named("other")
    found = three.difference(moe, dense, "mean")
    assert found is not None
    assert found.values == pytest.approx((-0.06, -0.08, -0.08))
    assert found.mean == pytest.approx(-0.22 / 3)
    assert found.stdev == pytest.approx(math.sqrt(4 / 3) / 100)
    half = 4.302653 * math.sqrt(4 / 3) / 100 / math.sqrt(3)
    assert found.interval == pytest.approx((-0.22 / 3 - half, -0.22 / 3 + half))
    assert (found.open, three.tied(dense, "mean"), three.tied(other, "mean")) == (
        False,
        False,
        True,
    )
    shown = [comparison_tables.shown(three, one, "mean") for one in (moe, dense, other)]
    assert shown == ["2.503 ± 0.057*", "2.577 ± 0.068", "2.507 ± 0.055~"]
    what, (head, *rows) = comparison_tables.differences(three, "dense")
    assert head == ["system", "math", "mean", "95% of the mean's", "seeds"]
    assert rows[2] == ["moe", "-0.267 ± 0.058", "-0.073 ± 0.012", "-0.102 to -0.045", "3"]
    assert "less dense's" in what
    told = json.loads(comparison_tables.as_json(three, ["dense"]))["differences"]
    assert set(told) == {"moe", "dense"}  # the best mean, and what is asked for
    assert told["dense"]["moe"]["mean"] == {
        "mean": found.mean, "stdev": found.stdev, "interval": list(found.interval or ()), "n": 3,
    }  # fmt: skip
    assert comparison_tables.differences(three, "dense")[1] in [
        rows for _, rows in comparison_tables.tables(three, ["dense"])
    ]
    with pytest.raises(UserError, match="--against none: there is no such system"):
        three.named("none")


def test_one_random_seed_has_no_interval(three: Comparison) -> None:
    first = [dataclasses.replace(s, losses={1: s.losses[1]}) for s in three.systems]
    made = dataclasses.replace(three, systems=tuple(first))
    what, rows = comparison_tables.differences(made, "dense")
    assert rows[3] == ["moe", "-0.200", "-0.060", "-", "1"]
    assert not made.tied(made.named("other"), "mean")
    assert [what for what, _ in comparison_tables.tables(made, [])] == [
        comparison_tables.retention(made)[0]  # type: ignore[index]
    ], "without --against no differences"
    strange = dataclasses.replace(made.named("moe"), losses={9: {"math": 2.0, "mean": 2.0}})
    assert made.difference(strange, made.named("dense"), "mean") is None


def test_student_t() -> None:
    """Tables of Student's distribution, two-sided 5%."""
    tabled = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622, 30: 2.0423, 120: 1.9799}
    assert {n: round(student_t(n), 4) for n in tabled} == tabled
    assert Paired((1.0, 1.0, 1.0)).interval == (1.0, 1.0)


def test_retention(three: Comparison) -> None:
    """The math expert gained 1.0, 1.0 and 1.2; moe has 0.7, 0.8 and 0.9 of that."""
    found = three.retained(three.named("moe"), "math")
    assert found is not None
    share, behind = found
    assert share.values == pytest.approx((0.7, 0.8, 0.75))
    assert behind.values == pytest.approx((0.3, 0.2, 0.3))
    kept = comparison_tables.retention(three)
    assert kept is not None
    assert kept[1][0] == ["system", "math"]
    assert kept[1][1] == ["expert:math", "100% ± 0% (+0.000)"]
    assert kept[1][3] == ["moe", "75% ± 5% (+0.267)"]
    told = json.loads(comparison_tables.as_json(three))["retention"]
    assert told["moe"]["math"]["share"]["mean"] == pytest.approx(0.75)
    assert told["seed"]["math"]["share"]["mean"] == 0
    assert three.retained(three.named("moe"), "mean") is None, "no expert of it"
    nothing = dataclasses.replace(three.named("expert:math"), losses=three.named("seed").losses)
    systems = (three.systems[0], nothing, *three.systems[2:])
    assert comparison_tables.retention(dataclasses.replace(three, systems=systems)) is None


def test_a_domain_without_retention_is_named(three: Comparison) -> None:
    """Its expert is no better than the seed there."""
    losses = {n: {**row, "code": row["math"]} for n, row in three.named("seed").losses.items()}
    useless = dataclasses.replace(three.named("seed"), name="expert:code", losses=losses)
    systems = tuple(
        dataclasses.replace(one, losses={n: {**row, "code": 1.0} for n, row in one.losses.items()})
        for one in three.systems
    )
    made = dataclasses.replace(
        three, systems=(*systems, useless), columns=("math", "code", *three.columns[1:])
    )
    what, (head, *_) = comparison_tables.retention(made)  # type: ignore[misc]
    assert head == ["system", "math"]
    assert "not of code, whose expert gained less than 0.01 nats" in what


def test_several_bases_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command reads the runs under each base; nothing is left to run."""
    for name in ("short", "long"):
        (tmp_path / name).mkdir()
        recipe, run_dir = make_run(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text((tmp_path / name / "recipe.yaml").read_text())
    path = run_dir / "results.json"
    content = json.loads(path.read_text())
    content["systems"]["btx"] |= {"train_flops": 5e15, "loss": {**FINAL["btx"], "mean": 2.5}}
    path.write_text(json.dumps(content))
    (tmp_path / "one.yaml").write_text("base: short.yaml\n")
    words = ["compare", str(tmp_path / "one.yaml"), "--out", str(tmp_path / "out")]
    words += [f"--base={tmp_path / name}.yaml" for name in ("short", "long")]
    assert main([*words, "--against", "dense", "--format", "csv"]) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    mean = {name: sum(loss.values()) / 4 for name, loss in FINAL.items()}
    assert told[1:4] == [
        ["system", "short", "long"],
        ["dense", f"{mean['dense']:.3f}", f"{mean['dense']:.3f}"],
        [recipe.name, f"{mean['btx']:.3f}*", "2.500*"],
    ]
    gaps = [f"{mean['btx'] - mean['dense']:+.3f}", f"{2.5 - mean['dense']:+.3f}"]
    assert [recipe.name, *gaps] in told
    assert told[-2][2] == "5e+15"
    bases = json.loads((tmp_path / "out" / "compare.json").read_text())["bases"]
    assert bases["long"]["systems"][recipe.name]["losses"]["1234"]["mean"] == 2.5
    rows = (tmp_path / "out" / "compare.csv").read_text().splitlines()
    assert rows[-1] == f"long,{recipe.name},1,5000000000000000,2.5,"
    assert recipe.name in (tmp_path / "out" / "compare.html").read_text()
    content["text"]["code"]["tokens"] = 61440
    path.write_text(json.dumps(content))
    assert main(words) == 2
    assert "other text of code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--base", "a/base.yaml", "--base", "b/base.yaml"], "there are two of the name base"),
        (["--base", "a/base.yaml", "--base", "same.yaml"], "same and base both run in"),
        (["--base", "a/base.yaml", "--base", "same.yaml", "--tasks", "gsm8k=x"], "give one --base"),
    ],
)
def test_bases_that_do_not_go_together(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/base.yaml", "b/base.yaml", "same.yaml"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"base: {DEMO}\nrun_dir: {tmp_path}/runs/{{name}}\n")
    Path("one.yaml").write_text("base: same.yaml\n")
    assert main(["compare", "one.yaml", "--dry-run", *more]) == 2
    assert words in capsys.readouterr().err


def test_the_frontier() -> None:
    """What no other is as good as in both; of equal ones one."""
    points = [(3.0, 1.0), (1.0, 5.0), (1.0, 4.0), (2.0, 4.0), (2.0, 3.0), (2.0, 3.0), (9.0, 1.5)]
    assert frontier(points) == [(1.0, 4.0), (2.0, 3.0), (3.0, 1.0)]


def test_pictures_against_each_cost(three: Comparison) -> None:
    """Time was not measured: nothing is drawn but the seed, which costs none after itself."""
    made = {one.name: one for one in figure_files.of_comparison(three)}
    assert list(made) == ["compare_compute", "compare_time", "compare_inference"]
    on = {}
    for name, figure in made.items():
        head, *rows = figure.rows
        on[name] = [row[0] for row in rows if row[head.index("on_frontier")]]
    # other costs less than moe and is worse; the seed is at 0, an expert by itself in no picture
    assert on["compare_compute"] == ["seed", "dense", "moe", "other"]
    assert on["compare_time"] == ["seed"]
    assert on["compare_inference"] == ["moe"]
    compute = comparison_figures.COSTS[0]
    assert comparison_figures.point(three.named("moe"), compute) == (100, pytest.approx(7.51 / 3))
    assert "expert:math" not in made["compare_compute"].svg


def test_time_in_training_steps() -> None:
    """Times the ranks of the attempt that took them; nothing but steps."""
    step = "time_metrics/end_to_end(s)"
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "world_size": 2, "time": 100.0},
        {"kind": "eval", "step": 0, "time_metrics/evaluation(s)": 50.0},
        {"kind": "train", "step": 1, step: 0.5},
        {"kind": "start", "step": 1, "world_size": 4},
        {"kind": "train", "step": 2, step: 0.25},
        {"kind": "save", "step": 2, "train/checkpoint_save_duration_s": 9.0},
    ]
    assert goodput.rank_seconds(records) == 2 * 0.5 + 4 * 0.25
    assert goodput.rank_seconds(records[:2]) is None
    system = System(name="a", system="btx", result=SystemResult(name="btx", loss={}), losses={})
    assert system.train_seconds is None
    assert dataclasses.replace(system, seconds={1: 30.0, 2: 20.0}).train_seconds == 20.0


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("name: mine, system: btm", "name: mine, system: btx", "name: is mine, as that of"),
        (
            "name: mine",
            "name: mine, random_seed: 2, mix: {router_init: zeros}",
            "name: is mine, as that of",
        ),
        ("name: dense, system: btx", "name: b", "another system's row, and this is btx"),
        ("name: mine", "name: mine, random_seed: 2, share: elsewhere, hang_minutes: 3", ""),
    ],
)
def test_a_row_is_one_system(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, second: str, words: str
) -> None:
    """Recipes of one name are one row where they differ by their random seed alone."""
    files = []
    for number, keys in enumerate((first, second)):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(f"{{base: {DEMO}, run_dir: runs/{number}, {keys}}}\n")
    code = main(["compare", *map(str, files), "--out", str(tmp_path / "out"), "--dry-run"])
    said = capsys.readouterr().err
    assert code == (2 if words else 0), said
    assert words in said
    assert not (tmp_path / "out").exists()
