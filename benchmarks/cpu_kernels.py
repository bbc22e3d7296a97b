"""What each of our own CPU operations is worth: step time with all of them, and without one.

    python benchmarks/cpu_kernels.py                       # every case and operation
    python benchmarks/cpu_kernels.py --case moe-demo --without attention rotary --rounds 9

A step is that of benchmarks/train_step.py in fp32. For each operation a second process does the
same step with Megatron's or torch's own in its place; steps alternate between the two, both having
the same loss on the same weights to 1e-4 (but for ``experts``).
The figure is the ratio of the median times, above 1
where ours is faster. An operation that is worth nothing anywhere has no place in the tree.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from train_step import Case, cases, ours


def _attention() -> None:
    from megatron_btx.engine.ops import attention

    attention._by_products = attention._fused


def _swiglu() -> None:
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from megatron.core.transformer import mlp

    mlp.bias_swiglu_impl = bias_swiglu_impl


def _dispatch() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    for name in ("permute", "unpermute", "sort_chunks_by_idxs"):
        setattr(token_dispatcher, name, getattr(moe_utils, name))


def _clipping() -> None:
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_scale

    clip_grads.multi_tensor_scale_impl = local_multi_tensor_scale


def _experts() -> None:
    """Megatron's SequentialMLP: one expert after the other."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_btx.engine import freezing, spec

    def names(_mlp: Any, prefix: str, rest: str) -> Iterator[str]:
        yield prefix + rest.replace("local_experts.", "")

    freezing._experts = names
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    spec.GroupedExperts = ModuleSpec(module=SequentialMLP, submodules=linears)


def _field(**fields: Any) -> Callable[[], None]:
    """Megatron's own way, by the option that asks for it."""

    def change() -> None:
        from megatron_btx.engine import model

        made = model.transformer_config

        def changed(*arguments: Any, **options: Any) -> Any:
            config = made(*arguments, **options)
            for name, value in fields.items():
                setattr(config, name, value)
            return config

        model.transformer_config = changed

    return change


WITHOUT: dict[str, Callable[[], None]] = {
    "attention": _attention,
    "rotary": _field(fused_single_qkv_rope=False),
    "swiglu": _swiglu,
    "cross_entropy": _field(cross_entropy_loss_fusion=False),
    "weight_gradient": _field(gradient_accumulation_fusion=False),
    "clipping": _clipping,
    "dispatch": _dispatch,
    "experts": _experts,
}
"""How a process does without each operation; called after what this machine needs is installed."""
MOE_ONLY = ("dispatch", "experts")


class Side:
    """A process that takes a step when it is asked to."""

    def __init__(self, case: Case, threads: int, folder: Path, without: str | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        place = folder / f"rendezvous-{without}"
        self.process = context.Process(target=_serve, args=(theirs, case, threads, place, without))
        self.process.start()
        theirs.close()

    def step(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        self.pipe.send(True)
        seconds, loss = self.pipe.recv()
        return seconds, loss

    def end(self) -> None:
        """Let the process go."""
        self.pipe.close()
        self.process.join()


def _serve(
    pipe: Connection, case: Case, threads: int, rendezvous: Path, without: str | None
) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(BTX_INIT_METHOD=f"file://{rendezvous}", RANK="0", WORLD_SIZE="1")
    if without is not None:
        from megatron_btx.engine import install

        install()
        WITHOUT[without]()
    step, _ = ours(case, threads)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            start = time.perf_counter()
            loss = step()
            pipe.send((time.perf_counter() - start, loss))


def measure(case: Case, without: str, rounds: int, threads: int) -> dict[str, Any]:
    """Both losses first, then the times of alternating steps."""
    with tempfile.TemporaryDirectory() as folder:
        mine = Side(case, threads, Path(folder), None)
        other = Side(case, threads, Path(folder), without)
        losses = mine.step()[1], other.step()[1]
        # Experts of another class are other parameters, drawn in another order.
        assert without == "experts" or abs(losses[0] - losses[1]) < 1e-4, losses
        for side in (mine, other):
            side.step()
        times = [(mine.step()[0], other.step()[0]) for _ in range(rounds)]
        mine.end()
        other.end()
    with_it, without_it = (statistics.median(each) for each in zip(*times, strict=True))
    return {
        "ratio": round(without_it / with_it, 3),
        "milliseconds": round(1e3 * with_it, 1),
        "without_milliseconds": round(1e3 * without_it, 1),
    }


def main() -> None:
    """Run the chosen cases and print one JSON line for each operation."""
    every = {name[: -len("-fp32")]: case for name, case in cases().items() if "fp32" in name}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="*", choices=every, default=list(every))
    parser.add_argument("--without", nargs="*", choices=WITHOUT, default=list(WITHOUT))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    for name in options.case:
        for operation in options.without:
            if operation in MOE_ONLY and not every[name].is_moe:
                continue
            found = measure(every[name], operation, options.rounds, options.threads)
            print(json.dumps({"case": name, "without": operation} | found), flush=True)


if __name__ == "__main__":
    main()
