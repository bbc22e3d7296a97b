"""What a machine with one GPU can prove, without a network; by estimate eight minutes of an H100.

    bash benchmarks/gpu_wheels.sh WHEELS        # elsewhere, with a network: what the machine lacks
    pip install --no-index --find-links WHEELS megatron-btx
    python benchmarks/gpu_check.py              # JSON lines; exit code 1: a check failed, 2: no GPU
    python benchmarks/gpu_check.py --only transformer_engine demo    # parts of it
    python benchmarks/gpu_check.py --device cpu --tiny  # the script itself, every branch, anywhere

For a dense and an MoE model (4 experts, top-2) of about a billion parameters each, first with
torch's layers, then, where Transformer Engine is installed, with its layers:

``small``: a small one of the kind takes three steps in fp32, is saved, and takes two more.
``train``: the large one trains in bf16 (fp32 master weights); the steps after the third are timed.
``profile``: the kernels that take most of a step's time.
``save``, ``resume``: it is saved, trained for two steps more, built anew, loaded, and trained for
the same two steps: the largest difference is 0 where the GPU's kernels are deterministic.
``balance``: the MoE once more with random routes (Megatron's
``moe_router_force_load_balancing``), which load every expert alike.
``moves``: the small models that the other kind of layers saved are loaded and take the two steps.

Then ``agreement`` holds these against each other and against a process that sees no GPU, which has
computed in the meantime: losses of the small models, the large one's first loss in fp32, both kinds
of layers, both directions of a checkpoint. Last comes ``demo``: the recipe of examples/demo from
its text to its Hugging Face export, on one rank, with its losses.

A JSON line is printed as soon as a check is done, with the ``layers``, the ``model`` and the
seconds that it took, so that a run that is cut keeps its results. A check that fails is a line too,
and the next part goes on.

Model FLOP utilisation is  tokens/s * F / P.  F, FLOPs of training one token, is
``megatron_btx.recipe.count.training_flops_per_token``: 6 for every weight that takes part in a
matrix product for that token (two of four experts; the output layer, not the embedding) plus
12 * layers * hidden * sequence for attention; recomputation would not count. P is the GPU's peak
of dense bf16 products (``recipe.chips``), or ``--peak-tflops``; without either the utilisation is
null.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_models import BF16, TOLERANCE, Check, Line, apart, guarded, options_of, say, within

from megatron_btx.engine.platform import detect
from megatron_btx.evaluate.results import MEAN, Results

EXAMPLES = Path(__file__).parents[1] / "examples"
MODELS = Path(__file__).with_name("gpu_models.py")
PARTS = ("torch", "transformer_engine", "demo")


def check_all(options: argparse.Namespace) -> bool:
    """Print every line; whether none has failed."""
    lines = [line for part in (_layers, _demo) for line in part(options)]
    return not any("failed" in line for line in lines)


def _layers(options: argparse.Namespace) -> Iterator[Line]:
    """Lines of both kinds of layers, then of their agreement."""
    asked, found = list(passes(options)), []
    if not asked:
        return
    with ask(options, "--reference", gpus="") as cpu:
        for arguments in asked:
            begun = time.perf_counter()
            with ask(options, *arguments) as process:
                found += [line for line in map(_passed_on, process.stdout or ()) if line]
            if process.returncode:
                failed = f"{' '.join(arguments)} ended with {process.returncode}"
                yield say("error", begun, {"failed": failed})
        yield from found
        begun = time.perf_counter()
        expected = cpu.communicate()[0]
    if cpu.returncode:
        yield say("error", begun, {"failed": f"--reference ended with {cpu.returncode}"})
        return
    for one in agreement(found, json.loads(expected.splitlines()[-1])):  # a library may speak first
        yield say("agreement", begun, one)


def _passed_on(line: str) -> Line | None:
    """Printed at once, what is not ours to stderr."""
    ours = line.startswith("{")
    print(line, end="", flush=True, file=sys.stdout if ours else sys.stderr)
    return json.loads(line) if ours else None


def _demo(options: argparse.Namespace) -> Iterator[Line]:
    begun = time.perf_counter()
    if "demo" in options.only:
        for check, values in guarded(demo(options, options.folder)):
            yield say(check, begun, values)


def _device(options: argparse.Namespace) -> Line:
    machine, memory = detect(), {}
    if machine.cuda:
        memory = {"memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}
    return {
        "device": torch.cuda.get_device_name() if machine.cuda else "cpu",
        **memory,
        "torch": torch.__version__,
        "transformer_engine": machine.transformer_engine,
        "apex": machine.apex,
        "tiny": options.tiny,
    }


def agreement(found: list[Line], cpu: dict[str, Any]) -> Iterator[Line]:
    """How far the lines of all kinds of layers are from the CPU's figures and from each other's.

    Args:
        found: lines of ``models``, in their order.
        cpu: ``reference`` by kind.
    """
    agree = {"small": _small_agree, "train": _large_agree, "moves": _moved_agree}
    for at, line in enumerate(found):
        if line["check"] in agree:
            earlier = [one for one in found[:at] if one["model"] == line["model"]]
            about = {key: line[key] for key in ("layers", "model")} | {"of": line["check"]}
            for one in agree[line["check"]](line, earlier, cpu[line["model"]]):
                yield about | one


def _small_agree(line: Line, _earlier: list[Line], cpu: Line) -> Iterator[Line]:
    loss, norm = TOLERANCE[line["layers"]]
    (losses, norms), (on_cpu, cpu_norms) = (zip(*one["steps"], strict=True) for one in (line, cpu))
    yield within("loss_to_cpu", apart(losses, on_cpu), loss)
    ratios = [a / b for a, b in zip(norms, cpu_norms, strict=True)]
    yield within("grad_norm_to_cpu", apart(ratios, [1] * len(ratios)), norm)


def _large_agree(line: Line, earlier: list[Line], cpu: Line) -> Iterator[Line]:
    yield within("bf16_to_cpu_fp32", abs(line["first_sequence"] - cpu["large"]), BF16)
    for other in earlier:
        if other["check"] == "train":
            difference = apart(line["losses"][:3], other["losses"][:3])
            yield within(f"bf16_to_{other['layers']}", difference, BF16)


def _moved_agree(line: Line, earlier: list[Line], _cpu: Line) -> Iterator[Line]:
    for saver in earlier:
        if (saver["check"], saver["layers"]) == ("small", line["from"]):
            limit = max(TOLERANCE[one["layers"]][0] for one in (line, saver))
            yield within("to_its_saver", apart(line["two_more"], saver["two_more"]), limit)


def demo(options: argparse.Namespace, folder: Path) -> Iterator[Check]:
    """The whole recipe on one rank, from its text to the export; it has to be what the paper says
    (section 4.2): every expert is the best one at home, and the mix is better than the seed."""
    recipe = folder / "demo.yaml"
    run_dir = folder / "demo"
    base = EXAMPLES / ("tiny" if options.tiny else "demo") / "recipe.yaml"
    one_rank = {"layout": {"data_parallel_size": 1, "expert_model_parallel_size": 1}}
    changed: Line = {
        "base": str(base),
        "run_dir": str(run_dir),
        "seed": one_rank,
        "finetune": one_rank,
    }
    changed |= {"wandb": {"mode": "disabled"}}
    if options.tiny:
        changed |= {"dense": None, "export": {"format": "none"}}
    recipe.write_text(json.dumps(changed))
    command = [sys.executable, "-W", "ignore", "-m", "megatron_btx.cli", "run", str(recipe)]
    subprocess.run(command, stdout=sys.stderr, check=True)
    results = Results.read(run_dir)
    assert results is not None
    loss = {name: dict(system.loss) for name, system in results.systems.items()}
    yield "demo", {"loss": loss}
    if options.tiny:  # its models learn little
        return
    experts = {name.partition(":")[2]: of for name, of in loss.items() if name.startswith("expert")}
    for domain, own in experts.items():
        assert own[domain] == min(of[domain] for of in experts.values()), f"{domain}: no expert"
    assert loss["btx"][MEAN] < loss["seed"][MEAN], "the mix is no better than the seed"


def passes(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Arguments of the processes, one after the other: each kind of layers by itself."""
    if "torch" in options.only:
        yield ("--layers", "torch")
    if "transformer_engine" not in options.only:
        return
    second = "stand_in" if options.device == "cpu" else "transformer_engine"
    if second == "transformer_engine" and not detect().transformer_engine:
        say(second, time.perf_counter(), {"not_run": "it is not installed, or cannot be imported"})
        return
    yield ("--layers", second)
    if "torch" in options.only:
        yield ("--layers", "torch", "--moves")


def ask(options: argparse.Namespace, *more: str, gpus: str | None = None) -> subprocess.Popen[str]:
    """Those checks, in a process of their own. ``gpus``: its ``CUDA_VISIBLE_DEVICES``."""
    command = [sys.executable, "-W", "ignore", str(MODELS), "--folder", str(options.folder), *more]
    command += ["--steps", str(options.steps), "--batch", str(options.batch)]
    command += ["--tiny"] * options.tiny
    if options.peak_tflops:
        command += ["--peak-tflops", str(options.peak_tflops)]
    env = dict(os.environ) | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Print a JSON line a check, or say why not."""
    parser = argparse.ArgumentParser(
        description="What one GPU can prove: correctness, speed, saves, the demo. JSON lines."
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options, there = options_of(parser), torch.cuda.is_available()
    if options.device == "cuda" and not there:
        print(
            "no GPU: torch.cuda.is_available() is False (a torch built for CPUs, or no driver?); "
            "try the script with --device cpu --tiny",
            file=sys.stderr,
        )
        sys.exit(2)
    if options.device == "cpu" and there:
        print("--device cpu needs CUDA_VISIBLE_DEVICES= (empty) here", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        options.folder = Path(folder)
        say("device", time.perf_counter(), _device(options))
        well = check_all(options)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
