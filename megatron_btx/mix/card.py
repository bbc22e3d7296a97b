"""The card of what ``btx mix`` wrote as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from megatron_btx.mix.plans import mix_of
from megatron_btx.mix.request import MixRequest
from megatron_btx.weights.card import Card, CardModel, Claim, engines
from megatron_btx.weights.plan import Checkpoint, Plan

_METHODS = {
    "btx": "The feed-forward layers of the models below are the experts of a mixture, all else is "
    "their average, and one linear router a layer is newly initialised: the mix of "
    "Branch-Train-MiX ([arXiv 2403.07816](https://arxiv.org/abs/2403.07816), section 3.2). Its "
    "routers have learned nothing yet: finetune it.",
    "split": "The feed-forward layers of the models below, each cut into parts, are the experts of "
    "a mixture; all else is their average (arXiv 2403.07816, section 3.3).",
    "blend": "Every expert of this mixture holds a part of the feed-forward layer of each of the "
    "models below; all else is their average (arXiv 2403.07816, section 3.3).",
    "upcycle": "Every expert of this mixture is a copy of the model's feed-forward layer (sparse "
    "upcycling).",
    "average": "The weights of the models below, averaged.",
    "append": "A mixture of experts, and one expert more.",
    "drop": "A mixture of experts without one of its experts.",
    "replace": "A mixture of experts, one of whose experts was put in another's place.",
    "copy": "The model below in another format: no weight was changed but for its rounding.",
}

_ASKED = ("out", "sources", "memory", "workers", "shard", "dry_run", "method", "format", "model")
"""Options that say nothing of the result, or that the card says elsewhere."""


def mix_card(
    plan: Plan,
    request: MixRequest,
    lineage: Mapping[str, Any],
    speaker: Checkpoint,
    llama_cpp: Sequence[str],
) -> Card:
    """The card of a result.

    Args:
        plan: of the result.
        request: what was asked for.
        lineage: what ``mix.json`` says.
        speaker: the source whose tokenizer the result has.
        llama_cpp: why that does not compute the result (families/llama_cpp.py).
    """
    sources = lineage["sources"]
    names = plan.architecture.experts
    models = [
        CardModel(
            name=source["name"],
            what=_what(source["name"], names, request),
            path=source["path"],
            sha256={name: digest for name, digest in source["sha256"].items() if _weights(name)},
        )
        for source in sources
    ]
    files = sum(len(source["sha256"]) for source in sources)
    default = MixRequest()
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in lineage["request"].items()
        if name not in _ASKED and value != getattr(default, name)
    }
    shown = yaml.safe_dump(options, sort_keys=False, allow_unicode=True) if options else ""
    what = f"{len(plan.targets)} tensors in {lineage['dtype']}"
    method = _METHODS[request.method]
    if request.base:
        method = (
            "The feed-forward layers of the experts below are those of a mixture, all else is "
            f"copied from {request.base}, as mergekit's mixtures are made; one linear router a "
            "layer is newly initialised."
        )
    return Card(
        title=f"{request.method}: {', '.join(model.name for model in models)}",
        method=method,
        architecture=plan.architecture,
        models=models,
        sections={
            "How": f"`btx mix --method {request.method}`, {what}; all of it stands in `mix.json`."
            + (f"\n\n```yaml\n{shown}```" if shown else ""),
            "Tokenizer": f"That of {speaker.label}, unchanged.",
            **engines(llama_cpp),
        },
        claims=[
            Claim(
                claim="the sources' files were hashed as they were read",
                figure={"files": files},
                command="btx verify .",
            ),
            Claim(
                claim="all tensors of the plan were written, and opened again",
                figure={"tensors": len(plan.targets), "plan": plan.hash},
                command="btx verify .",
            ),
        ],
        versions=lineage["versions"],
        code=lineage["code"],
    )


def _weights(name: str) -> bool:
    return not name.endswith((".json", ".model", ".txt", ".jinja", ".metadata", ".pt"))


def _what(name: str, experts: tuple[str, ...], request: MixRequest) -> str:
    if name == request.base:
        return "all that is no expert"
    own = mix_of(request).expert_names([name])
    places = [str(i) for i, expert in enumerate(experts) if expert in own]
    if request.method in ("btx", "split", "upcycle") and places:
        return f"expert{'s'[: len(places) - 1]} {', '.join(places)}"
    return {"copy": "the model", "average": "averaged", "blend": "a part of every expert"}.get(
        request.method, "a source"
    )
