"""What a machine with one GPU can prove, without a network and without Transformer Engine.

    pip install --no-index --find-links WHEELS megatron-btx
    python benchmarks/gpu_check.py                          # JSON lines; exit code 2: no GPU
    python benchmarks/gpu_check.py --device cpu --tiny      # the script itself, on any machine

For a dense and an MoE model (4 experts, top-2), each of about a billion parameters:

1. a small one of the kind takes three steps in fp32 on the GPU and, in a second process that sees
   no GPU, on the CPU, from the same weights on the same tokens: losses within 1e-4, gradient norms
   within a thousandth;
2. the large one's loss in bf16 on its first batch is within 2e-2 of the fp32 loss of the same
   weights, in a process that sees no GPU;
3. it trains in bf16 (fp32 master weights); the steps after the first three are timed;
4. it is saved, trained for two steps more, built anew, loaded, and trained for the same two steps;
   the largest difference of those losses is reported (0 where the GPU's kernels are deterministic).

A JSON line is printed as soon as its step is done, with the step's name (``check``), the model's
kind (``model``) and the seconds that it took, so that a run that is cut keeps its results.

Model FLOP utilisation is  tokens/s * F / P.  F, FLOPs of training one token, is
``megatron_btx.recipe.count.training_flops_per_token``: 6 for every weight that takes part in a
matrix product for that token (two of four experts; the output layer, not the embedding) plus
12 * layers * hidden * sequence for attention; recomputation would not count. P is the chip's peak
of dense bf16 products, by its name or ``--peak-tflops``; without either the utilisation is null.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.count import parameters, training_flops_per_token
from megatron_btx.recipe.schema import Layout, Model, Routing, Training

PEAK_TFLOPS = {"H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362}
"""Dense bf16, from the makers' data sheets (SXM forms; an H100 PCIe has 756)."""

EXPERTS = ("code", "math", "prose", "seed")
SMALL = Model(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=64,
)
LARGE = {  # about a billion parameters in all, each
    "dense": Model(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=5632,
        num_attention_heads=16,
        seq_length=2048,
    ),
    "moe": Model(
        num_layers=24,
        hidden_size=1024,
        ffn_hidden_size=2816,
        num_attention_heads=8,
        seq_length=2048,
    ),
}


def architecture(kind: str, model: Model, vocab_size: int) -> Architecture:
    """Dense, or four experts of which a token takes two."""
    dense = Architecture(model=model, vocab_size=vocab_size)
    return replace(dense, experts=EXPERTS, routing=Routing()) if kind == "moe" else dense


class Run:
    """A model on batches that follow from the step's number, in training unless told otherwise."""

    def __init__(
        self, what: Architecture, precision: Any, batch: int, *, trains: bool = True
    ) -> None:
        from megatron_btx.engine import distributed
        from megatron_btx.engine.checkpoint import TrainingState
        from megatron_btx.engine.model import build_model, wrap_ddp
        from megatron_btx.engine.optimizer import build_optimizer, build_schedule

        layout = Layout(num_threads=torch.get_num_threads())
        distributed.initialize(layout, random_seed=1)
        self.what, self.batch, self.step = what, batch, 0
        model = build_model(what, layout, precision)
        draws = torch.Generator().manual_seed(1)  # the CPU's: the same numbers on every machine
        with torch.no_grad():
            for param in model.parameters():
                if param.dim() == 1:
                    param.fill_(1)
                else:
                    param.copy_(torch.empty(param.shape).normal_(0, 0.02, generator=draws))
        self.model = model
        if not trains:  # gradients and moments of a billion parameters are 12 GB
            return
        training = Training(precision=precision, lr=3e-4, lr_warmup_iters=2)
        self.ddp = wrap_ddp(model, use_distributed_optimizer=False)
        self.optimizer = build_optimizer(self.ddp, training)
        self.schedule = build_schedule(self.optimizer, training, 1000)
        self.state = TrainingState(model=self.ddp, optimizer=self.optimizer, schedule=self.schedule)

    def train(self) -> tuple[float, float]:
        """One step; loss and gradient norm."""
        from megatron_btx.train.step import train_step

        result = train_step(
            self.ddp,
            self.optimizer,
            self.schedule,
            iter([self._rows()]),
            step=self.step,
            num_microbatches=1,
            micro_batch_size=self.batch,
            seq_length=self.what.model.seq_length,
        )
        self.step += 1
        return result.loss, result.grad_norm

    @torch.no_grad()
    def loss(self) -> float:
        """The loss that ``train`` would return, without a step."""
        from megatron_btx.train.step import forward_step

        losses, mean = forward_step(iter([self._rows()]), self.model, step=self.step)
        return mean(losses)[0].item()

    def _rows(self) -> dict[str, torch.Tensor]:
        seq, device = self.what.model.seq_length, torch.cuda.current_device()
        draws = torch.Generator().manual_seed(100 + self.step)
        uniform = torch.rand(self.batch, seq + 1, generator=draws)
        tokens = (uniform**3 * self.what.vocab_size).long().to(device)
        return {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": torch.ones(self.batch, seq, device=device),
            "position_ids": torch.arange(seq, device=device).expand(self.batch, -1).contiguous(),
            "samples": torch.arange(self.batch) + self.step * self.batch,
        }


def small_steps(kind: str) -> list[tuple[float, float]]:
    """Three fp32 steps of the small model on whatever this process sees."""
    run = Run(architecture(kind, SMALL, 500), "fp32", batch=4)
    return [run.train() for _ in range(3)]


def reference(kind: str, large: Architecture, batch: int) -> dict[str, Any]:
    """What ``against_cpu`` and the first loss in bf16 are held against."""
    steps = small_steps(kind)
    return {"small": steps, "large": Run(large, "fp32", batch, trains=False).loss()}


def ask_cpu(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """``reference`` of both kinds, from a process that sees no GPU."""
    command = [sys.executable, "-W", "ignore", __file__, "--device", "cpu", "--reference"]
    command += ["--batch", str(options.batch)] + ["--tiny"] * options.tiny
    done = subprocess.run(
        command,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def against_cpu(kind: str, expected: list[tuple[float, float]]) -> dict[str, float]:
    """The largest differences between this process's device and a process without a GPU."""
    here = small_steps(kind)
    loss = max(abs(a[0] - b[0]) for a, b in zip(here, expected, strict=True))
    norm = max(abs(a[1] / b[1] - 1) for a, b in zip(here, expected, strict=True))
    assert loss < 1e-4, f"{kind}: losses differ from the CPU's by {loss}"
    assert norm < 1e-3, f"{kind}: gradient norms differ from the CPU's by {norm} of their size"
    return {"loss_difference_to_cpu": loss, "grad_norm_difference_to_cpu": norm}


def large(kind: str, options: argparse.Namespace) -> tuple[Architecture, int]:
    """The model that is timed, and its batch."""
    if options.tiny:
        return architecture(kind, SMALL, 500), 2
    return architecture(kind, LARGE[kind], 32000), options.batch


def measure(
    kind: str, expected: dict[str, Any], options: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check small and large, train large, save, resume; what each step has found."""
    from megatron_btx.engine import checkpoint

    yield "small_against_cpu", against_cpu(kind, expected["small"])
    what, batch = large(kind, options)
    cuda = options.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = Run(what, "bf16", batch)
    losses, times = [], []
    for _ in range(3 + options.steps):
        start = time.perf_counter()
        losses.append(run.train()[0])  # reads the loss: waits for the GPU
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert all(map(math.isfinite, losses))
    rounding = abs(losses[0] - expected["large"])
    assert rounding < 2e-2, f"{kind}: the first loss in bf16 is {rounding} from the CPU's in fp32"
    assert losses[-1] < losses[0], f"{kind}: did not learn: {losses}"
    peak = torch.cuda.max_memory_allocated() if cuda else _resident()
    yield (
        "train",
        {
            **_speed(what, batch * what.model.seq_length / statistics.median(times[3:]), options),
            "peak_memory_gib": round(peak / 2**30, 3),
            "bf16_loss_difference_to_cpu_fp32": rounding,
            "first_loss": losses[0],
            "last_loss": losses[-1],
        },
    )

    saved = folder / kind
    manifest = checkpoint.manifest_of(what, precision="bf16", layout={"world_size": 1})
    start = time.perf_counter()
    checkpoint.save(saved, run.state, manifest)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in saved.iterdir() if path.is_file())
    yield "save", {"save_seconds": round(seconds, 2), "save_GB": round(size / 1e9, 4)}
    stopped_at = run.step
    unstopped = [run.train()[0] for _ in range(2)]
    del run
    _free(cuda)
    again = Run(what, "bf16", batch)
    checkpoint.load(saved, again.state)
    again.step = stopped_at
    difference = max(abs(again.train()[0] - loss) for loss in unstopped)
    assert difference < 1e-2, f"{kind}: the resumed run is another one: {difference}"
    del again
    _free(cuda)
    yield "resume", {"resume_difference": difference}


def _speed(what: Architecture, per_second: float, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens and model FLOPs a second."""
    flops = per_second * training_flops_per_token(what)
    tflops = options.peak_tflops or _peak_tflops(options.device == "cuda")
    counted = parameters(what)
    return {
        "parameters": counted.total,
        "parameters_active": counted.active,
        "tokens_per_second": round(per_second),
        "model_tflops_per_second": round(flops / 1e12, 3),
        "mfu": round(flops / (tflops * 1e12), 4) if tflops else None,
    }


def _resident() -> int:
    # Not ru_maxrss: across fork and exec it keeps the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _free(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()


def _peak_tflops(cuda: bool) -> float | None:
    name = torch.cuda.get_device_name() if cuda else ""
    return next((peak for chip, peak in PEAK_TFLOPS.items() if chip in name), None)


def main() -> None:
    """Print a JSON line a step, or say why not."""
    parser = argparse.ArgumentParser(description="Train about 1B parameters on one GPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of seconds, to try the script")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 2048 tokens a step")
    parser.add_argument("--peak-tflops", type=float, help="of dense bf16 products")
    parser.add_argument("--folder", type=Path, help="for the checkpoints (36 GB, deleted after)")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU: torch.cuda.is_available() is False (a torch built for CPUs, or no driver?); "
            "try the script with --device cpu --tiny",
            file=sys.stderr,
        )
        sys.exit(2)
    if options.device == "cpu" and torch.cuda.is_available():
        print("--device cpu needs CUDA_VISIBLE_DEVICES= (empty) here", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ.update(BTX_INIT_METHOD=f"file://{folder}/rendezvous", RANK="0", WORLD_SIZE="1")
        if options.reference:
            print(json.dumps({kind: reference(kind, *large(kind, options)) for kind in LARGE}))
            return
        from megatron_btx.engine.platform import detect

        platform = detect()
        begun = time.perf_counter()
        _say(
            "device",
            begun,
            {
                "device": torch.cuda.get_device_name() if platform.cuda else "cpu",
                "torch": torch.__version__,
                "layers": platform.layers,
                "optimizer": platform.optimizer,
                "tiny": options.tiny,
            },
        )
        begun = time.perf_counter()
        expected = ask_cpu(options)
        begun = _say("reference_on_the_cpu", begun, {"kinds": list(expected)})
        for kind in LARGE:
            for check, values in measure(kind, expected[kind], options, Path(folder)):
                begun = _say(check, begun, {"model": kind, **values})


def _say(check: str, begun: float, values: dict[str, Any]) -> float:
    """A line, at once; the time now, where the next step begins."""
    now = time.perf_counter()
    line = {"check": check, **values, "seconds": round(now - begun, 2)}
    print(json.dumps(line), flush=True)
    return now


if __name__ == "__main__":
    main()
