"""GPU-hours of a plan, against the paper's GPU-days (arXiv 2403.07816, table 3)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_btx.cli.main import main
from megatron_btx.errors import UserError
from megatron_btx.recipe import chips
from megatron_btx.recipe.load import load_recipe
from megatron_btx.recipe.run_plan import RunPlan, plan

EXAMPLES = Path(__file__).parents[2] / "examples"
PAPER = EXAMPLES / "paper_7b" / "recipe.yaml"
GPU_DAYS, MOE_SHARE = 926.1, 0.23
"""Of BTX with top-2 routing: 533B tokens, 23% of the time in the MoE."""


@pytest.fixture(scope="module")
def paper() -> RunPlan:
    return plan(load_recipe(PAPER))


def test_the_papers_gpu_days(paper: RunPlan) -> None:
    """The paper names no GPU. Its GPU-days are those of H100s at an MFU as usual then, the same for
    the dense experts and for the mixture; of A100s they would be more than the peak."""
    flops = {name: sum(s.train_flops for s in paper.stages if s.name in names) for name, names in
             (("moe", ["finetune"]), ("experts", set(paper.made_by) - {"finetune"}))}  # fmt: skip
    days = {"moe": MOE_SHARE * GPU_DAYS, "experts": (1 - MOE_SHARE) * GPU_DAYS}
    found = {
        part: flops[part] / (days[part] * 86400 * 1e12 * chips.PEAK_TFLOPS["h100"])
        for part in flops
    }
    assert found == {"moe": pytest.approx(0.33, abs=0.03), "experts": pytest.approx(0.33, abs=0.03)}
    whole = sum(flops.values()) / (GPU_DAYS * 86400 * 1e12)
    assert whole > chips.PEAK_TFLOPS["a100"]
    took = chips.estimate(paper, "h100", whole / chips.PEAK_TFLOPS["h100"]).system
    assert took.gpu_hours / 24 == pytest.approx(GPU_DAYS, rel=1e-9)
    # 23% of it in the mixture, as printed; "approximate", since its own rows do not add up exactly
    found_at = chips.estimate(paper, "h100", 0.33)
    moe = found_at.stages["finetune"].gpu_hours
    assert moe / chips.estimate(paper, "h100", 0.33).system.gpu_hours == pytest.approx(
        0.23, abs=0.02
    )


def test_hours_are_flops_over_peak_times_mfu(paper: RunPlan) -> None:
    found = chips.estimate(paper, "h100", 0.4, price=2.5)
    for stage in paper.stages:
        took = found.stages[stage.name]
        seconds = stage.train_flops / (989e12 * 0.4)
        assert took.gpu_hours == pytest.approx(seconds / 3600)
        assert took.days == pytest.approx(seconds / stage.ranks / 86400)
        assert took.cost == pytest.approx(2.5 * took.gpu_hours)
    assert found.total.gpu_hours == pytest.approx(sum(t.gpu_hours for t in found.stages.values()))
    experts = [t.days for name, t in found.stages.items() if name.startswith("expert:")]
    assert found.system.days == pytest.approx(max(experts) + found.stages["finetune"].days)
    assert found.total.days >= found.system.days
    assert chips.estimate(paper, "494.5", 0.8).system.gpu_hours == pytest.approx(
        found.system.gpu_hours
    )


@pytest.mark.parametrize("name", ["seed", "experts", "dense", "upcycling_dm", "btm_top1"])
def test_every_system_has_days(name: str) -> None:
    found = chips.estimate(plan(load_recipe(EXAMPLES / "systems" / f"{name}.yaml")), "h100")
    assert 0 < found.system.gpu_hours <= found.total.gpu_hours
    assert 0 < found.system.days <= found.total.days


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA B200", 2250),
        ("AMD Instinct MI300X", 1307),
        ("NVIDIA GeForce GTX 1080", None),
        ("cpu", None),
    ],
)
def test_names_as_torch_says_them(name: str, peak: float | None) -> None:
    assert chips.peak_tflops(name) == peak


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PAPER), "--gpu", "h100", "--price", "2", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    found = chips.estimate(plan(load_recipe(PAPER)), "h100", price=2.0)
    assert content["estimate"] == dataclasses.asdict(found)
    assert main(["plan", str(PAPER), "--gpu", "H100", "--mfu", "0.5"]) == 0
    said = capsys.readouterr().out
    assert "the system" in said
    assert "50% MFU" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "gtx"], "--gpu: 'gtx' is not in the table"),
        (["--gpu", "nan"], "is not in the table"),
        (["--gpu", "h100", "--mfu", "40"], "--mfu: is 40"),
        (["--gpu", "h100", "--price", "-1"], "--price: is -1"),
        (["--mfu", "0.4"], "add --gpu h100"),
    ],
)
def test_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(PAPER), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_estimate_needs_no_seed() -> None:
    with pytest.raises(UserError, match="not in the table"):
        chips.estimate(plan(load_recipe(PAPER)), "")


def test_what_does_not_fit_is_said(paper: RunPlan) -> None:
    assert chips.MEMORY_GB.keys() == chips.PEAK_TFLOPS.keys()
    lines = chips.too_large(paper, "NVIDIA A30")
    assert any(
        line.startswith("finetune needs 48.4GB on a GPU, and NVIDIA A30 has 24GB") for line in lines
    )
    assert chips.too_large(paper, "h100") == chips.too_large(paper, "abacus") == []
    assert chips.too_large(paper, None) == []
