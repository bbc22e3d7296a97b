"""Checks of one kind of layers: what each process does that gpu_check.py starts.

python benchmarks/gpu_models.py --layers torch --folder DIR         # JSON lines
python benchmarks/gpu_models.py --reference --folder DIR            # on a machine without a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from megatron_btx.engine.platform import detect
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.chips import peak_tflops
from megatron_btx.recipe.count import parameters, training_flops_per_token
from megatron_btx.recipe.schema import Layout, Model, Routing, Training

KINDS = ("dense", "moe")
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


TOLERANCE = {"torch": (1e-4, 1e-3), "transformer_engine": (1e-3, 1e-2), "stand_in": (1e-4, 1e-3)}
"""Of fp32 losses, and of gradient norms by their size, against the CPU. Transformer Engine's fp32
products may round their factors to TF32."""
BF16 = 2e-2
"""Of a loss in bf16: eight bits of mantissa, 2^-8 of a loss of some 10, over the square root of the
number of tokens."""

Line = dict[str, Any]
Check = tuple[str, Line]
"""A line's name and what else it says."""


def architecture(kind: str, model: Model, vocab_size: int) -> Architecture:
    """Dense, or four experts of which a token takes two."""
    dense = Architecture(model=model, vocab_size=vocab_size)
    return replace(dense, experts=EXPERTS, routing=Routing()) if kind == "moe" else dense


def large(kind: str, options: argparse.Namespace) -> tuple[Architecture, int]:
    """The model that is timed, and its batch."""
    if options.tiny:
        return architecture(kind, SMALL, 500), 2
    return architecture(kind, LARGE[kind], 32000), options.batch


class Run:
    """A model on batches that follow from the step's number, in training unless told otherwise.

    ``drawn``: not where its weights are read from a checkpoint.
    """

    def __init__(
        self,
        what: Architecture,
        precision: Any,
        batch: int,
        *,
        trains: bool = True,
        drawn: bool = True,
    ) -> None:
        from megatron_btx.engine import distributed
        from megatron_btx.engine.checkpoint import TrainingState
        from megatron_btx.engine.initializer import initialize
        from megatron_btx.engine.model import build_model, wrap_ddp
        from megatron_btx.engine.optimizer import build_optimizer, build_schedule
        from megatron_btx.mix.one_model import fresh

        layout = Layout(num_threads=torch.get_num_threads())
        distributed.initialize(layout, random_seed=1)
        self.what, self.precision, self.batch, self.step = what, precision, batch, 0
        self.model = build_model(what, layout, precision)
        if drawn:  # by name: the same numbers on every machine, with either kind of layers
            initialize(self.model, fresh(what, seed=1, dtype=torch.float32))
        if not trains:  # gradients and moments of a billion parameters are 12 GB
            return
        training = Training(precision=precision, lr=3e-4, lr_warmup_iters=2)
        self.ddp = wrap_ddp(self.model, use_distributed_optimizer=False)
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

    def losses(self, steps: int) -> list[float]:
        """Of so many steps."""
        return [self.train()[0] for _ in range(steps)]

    @torch.no_grad()
    def loss(self, sequences: int) -> float:
        """Of the batch's first sequences, without a step."""
        from megatron_btx.train.step import forward_step

        rows = {name: rows[:sequences] for name, rows in self._rows().items()}
        losses, mean = forward_step(iter([rows]), self.model, step=self.step)
        return mean(losses)[0].item()

    def save(self, path: Path) -> None:
        """A checkpoint of everything."""
        from megatron_btx.engine import checkpoint

        world = {"world_size": 1}
        manifest = checkpoint.manifest_of(self.what, precision=self.precision, layout=world)
        checkpoint.save(path, self.state, manifest)

    def load(self, path: Path, step: int) -> Run:
        """What ``save`` wrote after that step."""
        from megatron_btx.engine import checkpoint

        checkpoint.load(path, self.state)
        self.step = step
        return self

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


def reference(kind: str, options: argparse.Namespace) -> Line:
    """What a process without a GPU finds: three fp32 steps of the small model, the large one's
    loss on one sequence."""
    small = Run(architecture(kind, SMALL, 500), "fp32", batch=4)
    steps = [small.train() for _ in range(3)]
    what, batch = large(kind, options)
    return {"steps": steps, "large": Run(what, "fp32", batch, trains=False).loss(1)}


def models(options: argparse.Namespace, folder: Path) -> Iterator[Check]:
    """All checks of this process's kind of layers, which are made one by one."""
    for kind in KINDS if options.layers != "stand_in" else ("moe",):
        if not options.moves:
            saved = folder / f"small-{kind}-{options.layers}"
            yield from guarded(small_steps(kind, saved), model=kind)
            steps = large_steps(kind, options, folder / f"large-{kind}")
            yield from guarded(steps, model=kind)
        yield from guarded(moves(kind, options.layers, folder), model=kind)


def small_steps(kind: str, saved: Path) -> Iterator[Check]:
    """Three steps, a checkpoint, two more."""
    run = Run(architecture(kind, SMALL, 500), "fp32", batch=4)
    steps = [run.train() for _ in range(3)]
    run.save(saved)
    yield "small", {"model": kind, "steps": steps, "two_more": run.losses(2)}


def moves(kind: str, layers: str, folder: Path) -> Iterator[Check]:
    """The two steps that follow on the checkpoints of other kinds of layers."""
    for saved in sorted(folder.glob(f"small-{kind}-*")):
        if (of := saved.name.split("-")[2]) != layers:
            run = Run(architecture(kind, SMALL, 500), "fp32", batch=4, drawn=False)
            yield "moves", {"model": kind, "from": of, "two_more": run.load(saved, 3).losses(2)}


def large_steps(kind: str, options: argparse.Namespace, saved: Path) -> Iterator[Check]:
    """Speed, kernels, a checkpoint, and forced balance."""
    what, batch = large(kind, options)
    run = Run(what, "bf16", batch)
    yield "train", {"model": kind, **trained(run, options)}
    yield "profile", {"model": kind, **profile(run)}
    start = time.perf_counter()
    run.save(saved)
    seconds = round(time.perf_counter() - start, 2)
    size = sum(path.stat().st_size for path in saved.iterdir() if path.is_file())
    yield "save", {"model": kind, "save_seconds": seconds, "save_GB": round(size / 1e9, 4)}

    stopped_at, unstopped = run.step, run.losses(2)
    del run
    _free()
    run = Run(what, "bf16", batch, drawn=False)
    start = time.perf_counter()
    run.load(saved, stopped_at)
    seconds = round(time.perf_counter() - start, 2)
    shutil.rmtree(saved)
    difference = apart(run.losses(2), unstopped)
    about = {"model": kind, "load_seconds": seconds}
    yield "resume", about | within("resume_difference", difference, BF16)
    if kind == "moe":
        yield "balance", {"model": kind, **balanced(run, options)}
    del run
    _free()


def trained(run: Run, options: argparse.Namespace) -> Line:
    """Of a new model: its first loss, the experts' load, losses, speed, memory."""
    if cuda := torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    first, load = run.loss(1), expert_load(run)
    losses, speed = timed(run, options)
    peak = torch.cuda.max_memory_allocated() if cuda else _resident()
    found = {"first_sequence": first, "losses": losses, "peak_memory_gib": round(peak / 2**30, 3)}
    learned = math.isfinite(sum(losses)) and losses[-1] < losses[0]
    return {**speed, **load, **found} | ({} if learned else {"failed": "it did not learn"})


def timed(run: Run, options: argparse.Namespace) -> tuple[list[float], dict[str, Any]]:
    """Losses, and tokens and model FLOPs a second, three steps not counted."""
    losses, times = [], []
    for _ in range(3 + options.steps):
        start = time.perf_counter()
        losses.append(run.train()[0])  # reads the loss: waits for the GPU
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    what = run.what
    per_second = run.batch * what.model.seq_length / statistics.median(times[3:])
    flops = per_second * training_flops_per_token(what)
    peak = options.peak_tflops
    if peak is None and torch.cuda.is_available():
        peak = peak_tflops(torch.cuda.get_device_name())
    counted = parameters(what)
    return losses, {
        "parameters": counted.total,
        "parameters_active": counted.active,
        "tokens_per_second": round(per_second),
        "model_tflops_per_second": round(flops / 1e12, 3),
        "mfu": round(flops / (peak * 1e12), 4) if peak else None,
    }


def expert_load(run: Run) -> dict[str, float]:
    """The most tokens of an expert over the mean, in the layer where that is most; of an MoE."""
    from megatron_btx.engine.moe.router import collect_load

    if not run.what.experts:
        return {}
    with collect_load(run.model) as load:
        run.loss(run.batch)
    most = load.tokens.max(1).values / load.tokens.mean(1)
    return {"load_max_over_mean": round(most.max().item(), 3)}


def balanced(run: Run, options: argparse.Namespace) -> Line:
    """Speed with random routes. Set where the routers read it: recipes may ask for it beside
    Transformer Engine alone (``router_config``)."""
    from megatron_btx.engine.moe.router import routers

    for router in routers(run.model):
        router.config.moe_router_force_load_balancing = True
    load = expert_load(run)
    return {**timed(run, options)[1], **load}


def profile(run: Run) -> Line:
    """Milliseconds of a step by kernel (on a CPU by operator), the ten that take most."""
    kernels = DeviceType.CUDA if torch.cuda.is_available() else DeviceType.CPU
    time_of = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    steps, start = 2, time.perf_counter()
    with torch.profiler.profile() as found:
        run.losses(steps)
        torch.cuda.synchronize()
    wall = 1e3 * (time.perf_counter() - start) / steps
    times = {
        event.key: getattr(event, time_of) / 1e3 / steps
        for event in found.key_averages()
        if event.device_type == kernels and not event.is_user_annotation
    }
    most = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {
        "step_ms": round(wall, 3),  # with the profiler's own time
        "kernels_ms": round(sum(times.values()), 3),
        "most": [[name[:100], round(ms, 3)] for name, ms in most],
    }


def guarded(checks: Iterator[Check], **about: Any) -> Iterator[Check]:
    """Those checks; what they raise is the last one."""
    try:
        yield from checks
    except Exception as error:
        traceback.print_exc()
        yield "error", about | {"failed": f"{type(error).__name__}: {error}"[:500]}


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def within(name: str, difference: float, limit: float) -> Line:
    """A difference and its limit; over it, it has failed."""
    failed = {} if difference <= limit else {"failed": f"{name} is over its limit"}
    return {name: difference, "limit": limit} | failed


def _resident() -> int:
    # Not ru_maxrss: across fork and exec it keeps the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def say(check: str, begun: float, values: dict[str, Any]) -> Line:
    """A line, at once, with the seconds since ``begun``."""
    line = {"check": check, **values, "seconds": round(time.perf_counter() - begun, 2)}
    print(json.dumps(line), flush=True)
    return line


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What both scripts are told."""
    parser.add_argument("--tiny", action="store_true", help="models of seconds, to try the script")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 2048 tokens a step")
    parser.add_argument("--peak-tflops", type=float, help="of dense bf16 products")
    parser.add_argument("--folder", type=Path, help="for checkpoints (36 GB, deleted after)")
    options = parser.parse_args()
    options.folder = options.folder and options.folder.absolute()  # it becomes a part of a URL
    return options


def main() -> None:
    """Print a JSON line a check; with ``--reference`` one that holds everything."""
    parser = argparse.ArgumentParser(description="Checks of one kind of layers. JSON lines.")
    parser.add_argument("--reference", action="store_true", help="what the others are held against")
    parser.add_argument("--layers", choices=TOLERANCE, help="whose")
    parser.add_argument("--moves", action="store_true", help="the others' checkpoints alone")
    options = options_of(parser)
    warnings.simplefilter("ignore")
    rendezvous = options.folder / f"rendezvous-{os.getpid()}"
    os.environ.update(BTX_INIT_METHOD=f"file://{rendezvous}", RANK="0", WORLD_SIZE="1")
    if options.reference:
        print(json.dumps({kind: reference(kind, options) for kind in KINDS}))
        return
    if options.layers != "transformer_engine":  # as if it were not installed
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    assert detect().layers == options.layers.replace("stand_in", "torch")
    begun = time.perf_counter()
    for check, values in models(options, options.folder):
        say(check, begun, {"layers": options.layers} | values)
        begun = time.perf_counter()


if __name__ == "__main__":
    main()
