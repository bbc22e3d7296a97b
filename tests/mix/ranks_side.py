"""What the ranks of these tests do: save dense models, fill MoE models from plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_btx.recipe.schema import Layout, Routing, Training
from tests.engine.harness import DENSE, Pieces, local_shape, named_tensor, pieces, shards

ROUTING = Routing(type="topk")
SMALL = replace(DENSE, model=replace(DENSE.model, num_layers=2))
TIED = replace(SMALL, model=replace(SMALL.model, untie_embeddings_and_output_weights=False))


def save_dense(
    directory: Path, label: str, layout: Layout, precision: Any, optimizer: bool, tied: bool
) -> None:
    """A dense checkpoint whose every tensor follows from ``label`` and its stored name."""
    from megatron_btx.engine import checkpoint, distributed
    from megatron_btx.engine.model import build_model, wrap_ddp
    from megatron_btx.engine.optimizer import build_optimizer, build_schedule

    distributed.initialize(layout, 0)
    architecture = TIED if tied else SMALL
    model = build_model(architecture, layout, precision)
    with torch.no_grad():
        for name, shape, offset, local in shards(model, lambda param: param):
            cut = tuple(
                slice(o, o + n) for o, n in zip(offset, local_shape(local, shape), strict=True)
            )
            local.copy_(named_tensor(f"{label}/{name}", shape)[cut].reshape(local.shape))
    state = checkpoint.TrainingState(model=model)
    if optimizer:
        training = Training(precision=precision, layout=layout)
        ddp = wrap_ddp(model, use_distributed_optimizer=False)
        built = build_optimizer(ddp, training)
        state = checkpoint.TrainingState(
            model=ddp, optimizer=built, schedule=build_schedule(built, training, 5)
        )
    manifest = checkpoint.manifest_of(
        architecture, precision=precision, layout={"world_size": layout.world_size}
    )
    checkpoint.save(directory, state, manifest)


def mix_live(sources: dict[str, Path], layout: Layout, precision: Any) -> tuple[Pieces, dict, int]:
    """Build the MoE under ``layout``, fill this rank's shards, and bring them back.

    Returns:
        The shards, the bytes read per source, and the bytes of this rank's shards.
    """
    from megatron_btx.engine import distributed
    from megatron_btx.engine.initializer import initialize
    from megatron_btx.engine.model import build_model
    from megatron_btx.mix.btx import btx
    from megatron_btx.mix.router_init import RouterInit
    from megatron_btx.weights.megatron import open_megatron

    distributed.initialize(layout, 0)
    models = [open_megatron(directory, label) for label, directory in sources.items()]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    plan = btx(models, routing=ROUTING, dtype=dtype, router=RouterInit("normal", 0.5, seed=3))
    model = build_model(plan.architecture, layout, precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    read = initialize(model, plan)
    return pieces(model, lambda p: p), read, sum(p.nbytes for p in model.parameters())


def measure_centroids(
    subject: Any,
    layout: Layout,
    files: dict[str, list[str]],
    out: Path,
    seq_length: int,
    how: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """``btx centroids`` on these ranks; its answer, or its error."""
    from megatron_btx.engine import distributed
    from megatron_btx.errors import UserError
    from megatron_btx.evaluate.centroids import measure
    from megatron_btx.evaluate.loss_on_text import EvalSetting

    distributed.initialize(layout, 0)
    setting = EvalSetting(layout=layout, micro_batch_size=2, seq_length=seq_length)
    try:
        return measure(subject, files, setting, out=out, **(how or {"spread": 0.7}))
    except UserError as error:
        return {"error": str(error)}
