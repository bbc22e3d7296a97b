"""What no single field can tell: every check for which two facts must be known together.

``problems`` looks at the recipe alone and needs no machine, so that a plan works on a login node;
``files`` and ``bad_paths`` look at the disk; ``refuse_on_gloo`` is asked by the engine, which knows
the machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_btx.errors import UserError
from megatron_btx.recipe import (
    check_layout,
    check_mix,
    count,
    freezing,
    megatron_fields,
    slurm,
    systems,
)
from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.messages import near_key, path_problem, show
from megatron_btx.recipe.names import is_part
from megatron_btx.recipe.schema import Layout, Model, Recipe, Training
from megatron_btx.recipe.stages import (
    architecture,
    expert_stage,
    mismatches,
    model_stage,
    recipe_key,
    stage_of_key,
    training,
)

RESERVED = ("seed", "dense", "upcycling", "btm", "btx", "mean", "finetune")
"""Names of systems and columns of the final table, so no names of domains or experts."""


def problems(recipe: Recipe) -> list[Problem]:
    """Everything wrong with a recipe whose fields have the right types and ranges."""
    found = list(_names(recipe))
    found += _model(recipe.model)
    found += _tokenizer(recipe)
    found += _routing(recipe)
    found += check_mix.problems(recipe)
    found += _system(recipe)
    found += _boundaries(recipe)
    for key, stage in stages(recipe).items():
        found += _stage(recipe, key, stage)
    mixed = architecture(recipe, "finetune")
    found += check_layout.problems(
        recipe,
        "evaluate.layout",
        recipe.evaluate.layout,
        experts=mixed.experts,
        width=mixed.model.ffn_hidden_size,
    )
    found += check_layout.evaluation(recipe.evaluate.layout, "evaluate.layout")
    if recipe.evaluate.tokens < recipe.model.seq_length:
        found.append(Problem("evaluate.tokens", *_too_few(recipe.evaluate.tokens, recipe.model)))
    found += slurm.problems(recipe)
    return found


def stages(recipe: Recipe) -> dict[str, Training]:
    """The training stages by dotted key, in the order in which they run."""
    found = {"seed": recipe.seed}
    found |= {recipe_key(expert_stage(name)): expert for name, expert in recipe.experts.items()}
    found["finetune"] = recipe.finetune
    if recipe.dense is not None:
        found["dense"] = recipe.dense
    return found


def refuse_on_gloo(layout: Layout, key: str = "layout") -> None:
    """Refuse expert parallelism together with expert tensor parallelism where gloo runs.

    Megatron gathers the experts' tokens over the expert tensor group in unequal sizes, and gloo's
    ``all_gather`` wants equal ones («invalid tensor size»).

    Raises:
        UserError: the layout is such a one.
    """
    if layout.expert_model_parallel_size > 1 and layout.etp > 1:
        raise UserError(
            f"{key}.expert_tensor_parallel_size",
            f"EP {layout.expert_model_parallel_size} together with ETP {layout.etp} needs CUDA: "
            "gloo cannot gather the unequal numbers of tokens",
            "set it to 1 on this machine",
        )


def _variable(path: Path) -> str | None:
    """A name in a path that a shell would replace, unless there is such a directory."""
    parts = (one for one in (path, *path.parents) if re.search(r"\$\{?\w", one.name))
    return next((one.name for one in parts if not one.exists()), None)


def _names(recipe: Recipe) -> Iterator[Problem]:
    pattern = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
    rule = "use letters, digits, `_`, `-` and `.`, 100 of them at most"
    if not pattern.fullmatch(recipe.name):
        yield Problem("name", f"{show(recipe.name)} cannot name a directory", rule)
    elif wrong := path_problem(recipe.run_dir):
        yield Problem("run_dir", wrong, "give another path")
    elif wrong := _variable(Path(recipe.run_dir)):
        what = f"{wrong} is no variable here: a directory of that name would be made"
        yield Problem("run_dir", what, "write the path itself; `~` stands for your home")
    if recipe.wandb.mode != "disabled" and (wrong := _project(recipe.wandb.project)):
        yield Problem("wandb.project", wrong, "give a plain name; a team is `wandb.entity`")
    for wrong in filter(None, map(path_problem, recipe.share)):
        yield Problem("share", wrong, "correct the path")
    for key, names in (("domains", recipe.domains), ("experts", recipe.experts)):
        if not names:
            yield Problem(key, "is empty", f"name at least one of the {key}")
        for name in names:
            if not pattern.fullmatch(name):
                yield Problem(f"{key}.{name}", f"{show(name)} cannot name a directory", rule)
            elif name in RESERVED:
                yield Problem(
                    f"{key}.{name}",
                    f"{name} has a meaning of its own in the final table",
                    "choose another name"
                    + ("; the seed is an expert by `mix.include_seed`" if name == "seed" else ""),
                )
    for name in recipe.experts if recipe.mix.chunks > 1 else ():
        for other in recipe.experts:
            if name != other and is_part(name, other):
                what = f"is what a part of expert {other} is called"
                yield Problem(f"experts.{name}", what, "choose another name")
    for name, domain in recipe.domains.items():
        if bool(domain.train) == (domain.builtin is not None):
            what = "has both files and built-in text" if domain.train else "has no text"
            yield Problem(f"domains.{name}", what, "give either `train:` or `builtin:`")
        weights = domain.weights
        if weights and len(weights) != len(domain.train):
            what = f"are {len(weights)} for the {len(domain.train)} paths of train"
            yield Problem(f"domains.{name}.weights", what, "give one for each path, or none")


def _project(name: str) -> str | None:
    """What W&B has against a project's name."""
    if not 1 <= len(name) <= 128:
        return f"{show(name)} has {len(name)} characters, and W&B takes 1 to 128"
    taken = [c for c in name if c in "/\\#?%:" or not c.isprintable()]
    return f"{show(name)} holds {taken[0]!r}, which W&B refuses" if taken else None


def _model(model: Model) -> Iterator[Problem]:
    for key, what, fix in check_layout.model_problems(model):
        yield Problem(f"model.{key}", what, fix)
    for name in (
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
    ):
        if getattr(model, name):
            yield Problem(
                f"model.{name}",
                "belongs to an MoE that was not mixed here: the experts of a mix are its dense "
                "models' feed-forward layers, and none of them is shared",
                "remove it",
            )


def _tokenizer(recipe: Recipe) -> Iterator[Problem]:
    tokenizer = recipe.tokenizer
    if tokenizer.type == "huggingface" and tokenizer.path is None and recipe.seed.from_ is None:
        yield Problem(
            "tokenizer.path",
            "is missing: a Hugging Face tokenizer is taken, not trained",
            "give its directory, or use type: sentencepiece",
        )


def _routing(recipe: Recipe) -> Iterator[Problem]:
    routing, experts = recipe.routing, recipe.num_moe_experts
    k = routing.moe_router_topk
    if routing.type == "topk" and k > experts:
        yield Problem(
            "routing.moe_router_topk",
            f"top-{k} of {experts} experts ({', '.join(recipe.expert_names)})",
            f"choose at most {experts}",
        )
    elif routing.type == "topk" and k == 1 and not routing.moe_router_pre_softmax:
        yield Problem(
            "routing.moe_router_topk",
            "the softmax over one selected logit is always 1, so the router would never learn",
            "use type: switch or type: sample_top1 for one expert a token (section 3.3)",
        )
    if routing.moe_router_pre_softmax and routing.type != "topk":
        what = f"has no meaning for type {routing.type}"
        yield Problem("routing.moe_router_pre_softmax", what, "remove it, or use type: topk")
    if routing.moe_aux_loss_coeff and routing.moe_router_load_balancing_type == "none":
        yield Problem(
            "routing.moe_aux_loss_coeff",
            "has no effect while moe_router_load_balancing_type is none",
            "choose aux_loss or seq_aux_loss, or remove it",
        )
    same_in_all_layers = routing.greedy and not routing.first_layer_soft
    if recipe.export.format == "hf" and routing.type == "sample_top1" and not same_in_all_layers:
        yield Problem(
            "export.format",
            "no Hugging Face family draws its experts, or routes softly in its first layer only",
            "set `export: {format: none}`, or routing `greedy: true, first_layer_soft: false`",
        )


def _system(recipe: Recipe) -> Iterator[Problem]:
    """What the system of a recipe asks of its other blocks."""
    upcycling = recipe.system == "upcycling"
    if upcycling != (recipe.mix.method == "upcycle"):
        fix = "give both `system: upcycling` and `mix: {method: upcycle}`, or neither"
        yield Problem("mix.method", f"is {recipe.mix.method} in a system {recipe.system}", fix)
    if recipe.system == "dense" and recipe.dense is None:
        yield Problem("dense", "is missing, and is the system", "add `dense: {}`")
    if "finetune" in systems.kinds(recipe) and not recipe.finetune.tokens:
        what = "is missing, or 0: a system with an MoE finetunes it"
        fix = "add `finetune: {tokens: 4M, data: {...}}`, or choose a system without one: "
        yield Problem("finetune.tokens", what, fix + "`system: experts`, `btm` or `dense`")
    if recipe.system == "btm" and recipe.btm.method in ("top1", "top2"):
        for name in ("seed", *recipe.experts):
            stage = model_stage(name)
            if not training(recipe, stage).data:
                what = f"is missing: btm.method {recipe.btm.method} compares contexts with it"
                fix = "say what the model was trained on, or choose `btm: {method: posterior}`"
                yield Problem(f"{recipe_key(stage)}.data", what, fix)
    if recipe.match == "compute" and not any(_model(recipe.model)):
        yield from _matched(recipe)


def _matched(recipe: Recipe) -> Iterator[Problem]:
    """Whether ``match: compute`` can be fulfilled, within 1%."""
    taking_part = systems.kinds(recipe)
    off = {
        name: share
        for name, share in mismatches(recipe).items()
        if name.partition(":")[0] in taking_part
    }
    if not off:
        what = f"compute, but in a system {recipe.system} nothing is trained after the seed"
        yield Problem("match", what, "remove it, or choose another system")
    for name, share in off.items():
        if share > 0.01:
            yield Problem(
                f"{recipe_key(name)}.global_batch_size",
                f"whole steps of it miss the training FLOPs of BTX by {share:.1%}",
                "lower it, or give more tokens: within 1% is matched",
            )


def _boundaries(recipe: Recipe) -> Iterator[Problem]:
    """What stages do at the ends of documents: their models are mixed, and compared on one text."""
    for name in ("reset_attention_mask", "eod_mask_loss"):
        for key, stage in stages(recipe).items():
            if getattr(stage, name) != getattr(recipe.finetune, name):
                what = f"is {str(getattr(stage, name)).lower()}, and in finetune it is not"
                fix = "set it under `training:`, for all stages: models are mixed, and compared"
                yield Problem(f"{key}.{name}", what, fix)


def _stage(recipe: Recipe, key: str, stage: Training) -> Iterator[Problem]:
    if stage.reset_position_ids and not stage.reset_attention_mask:
        yield Problem(
            f"{key}.reset_position_ids",
            "is not supported alone: Megatron's rotary embedding does not look at position ids",
            "remove it, or set reset_attention_mask too: positions count by their differences, and "
            "only those within a document are left then",
        )
    model, layout = recipe.model, stage.layout
    if key == "seed" and not stage.tokens and stage.from_ is None:
        yield Problem("seed.tokens", "there is nothing to branch from", "give tokens or `from:`")
    if key == "finetune" and stage.from_ is not None:
        what = "a finetuning starts from the mix of this recipe's experts"
        fix = "remove it; give the experts instead (`experts: {code: {from: DIR}}`), or mix anew"
        yield Problem("finetune.from", what, fix)
    trains = stage.tokens > 0 and stage.from_ is None
    read = trains or (stage.tokens > 0 and key.startswith("experts.") and _is_matched(recipe))
    if key != "dense":
        if stage.data:
            yield from check_mix.weights(f"{key}.data", stage.data, recipe.domains, "domain")
        elif read:
            name = key.removeprefix("experts.")
            hint = near_key(name, recipe.domains) if key.startswith("experts.") else ""
            yield Problem(
                f"{key}.data", "is missing: which domains?", f"add `data: {{domain: weight}}`{hint}"
            )
    name = stage_of_key(key)
    trained = architecture(recipe, name)
    width = trained.model.ffn_hidden_size
    yield from check_layout.problems(
        recipe, f"{key}.layout", layout, experts=trained.experts, width=width
    )
    if not any(_model(model)):
        if trained.experts:
            yield from _widths(key, stage, model, model.ffn_hidden_size // width)
        yield from freezing.problems(key, training(recipe, name), trained, model)
    yield from _anchor(recipe, key, stage)
    batch = stage.micro_batch_size * layout.data_parallel_size
    if stage.global_batch_size % batch:
        yield Problem(
            f"{key}.global_batch_size",
            f"{stage.global_batch_size} is not divisible by micro_batch_size x data_parallel_size "
            f"({stage.micro_batch_size} x {layout.data_parallel_size})",
            f"use a multiple of {batch}",
        )
    else:
        micro_batches = stage.global_batch_size // batch
        yield from check_layout.batches(layout, f"{key}.layout", micro_batches)
    yield from _learning_rate(key, stage, count.steps(stage, model) if trains else 0)
    if stage.eval_tokens < model.seq_length:
        yield Problem(f"{key}.eval_tokens", *_too_few(stage.eval_tokens, model))
    for block in megatron_fields.SOURCES:
        for name, value in getattr(stage.megatron, block).items():
            wrong = megatron_fields.problem(block, name, value)
            if wrong is not None:
                yield Problem(f"{key}.megatron.{block}.{name}", *wrong)


def _learning_rate(key: str, stage: Training, steps: int) -> Iterator[Problem]:
    """What Megatron's schedule would refuse, or compute from a decay that began before step 0."""
    if stage.min_lr is not None and stage.min_lr > stage.lr:
        yield Problem(f"{key}.min_lr", f"{stage.min_lr} is above lr ({stage.lr})", "lower it")
    iters, where = stage.lr_wsd_decay_iters, f"{key}.lr_wsd_decay_iters"
    if stage.lr_decay_style != "WSD":
        if iters is not None:
            what = f"is of lr_decay_style WSD, and that is {stage.lr_decay_style}"
            yield Problem(where, what, "remove it, or set `lr_decay_style: WSD`")
    elif iters is None:
        fix = "add `lr_wsd_decay_iters: ` and a number of steps"
        yield Problem(f"{key}.lr_decay_style", "WSD decays for how many steps?", fix)
    elif steps and iters + min(stage.lr_warmup_iters, steps - 1) > steps:
        what = (
            f"warm-up ({stage.lr_warmup_iters}) and decay ({iters}) do not fit into {steps} steps"
        )
        yield Problem(where, what, "lower it, or give the stage more tokens")


def _anchor(recipe: Recipe, key: str, stage: Training) -> Iterator[Problem]:
    """Where an anchor has a meaning."""
    if stage.anchor is None:
        return
    where, ranks = f"{key}.anchor", recipe.evaluate.layout.expert_model_parallel_size
    if not key.startswith("experts."):
        yield Problem(where, "is of an expert's branch", "write it under `experts`")
    elif recipe.system == "btm":
        what = "makes MoEs of the experts, and Branch-Train-Merge is of dense ones"
        yield Problem(where, what, "remove it, or use another system")
    elif recipe.mix.method != "btx":
        what = f"is concatenated, not mixed by method {recipe.mix.method}"
        yield Problem(where, what, "use method btx")
    elif not stage.tokens and stage.from_ is None:
        yield Problem(where, "is of a branch that is trained", "give it tokens, or remove it")
    elif 2 % ranks:
        what = f"{ranks} does not divide a branch's 2 experts ({key})"
        yield Problem("evaluate.layout.expert_model_parallel_size", what, "use 1 or 2")


def _widths(key: str, stage: Training, model: Model, chunks: int) -> Iterator[Problem]:
    """Rows of the experts' grouped products begin at multiples of 16 bytes."""
    multiple = 8 if stage.precision == "bf16" else 4
    parts = stage.layout.etp * chunks
    width = model.ffn_hidden_size // parts
    for what, size in (("hidden_size", model.hidden_size), ("ffn_hidden_size", width)):
        if size % multiple:
            yield Problem(
                f"model.{what}",
                f"an expert's {what} on a rank of {key} is {size}, not a multiple of {multiple} "
                f"({stage.precision})",
                f"use a multiple of {multiple}"
                + (f" x {parts}" if what == "ffn_hidden_size" else ""),
            )


def _is_matched(recipe: Recipe) -> bool:
    """Whether another system reads the text of the experts, those that are taken among them."""
    upcycled = recipe.system == "upcycling" and recipe.match == "data"
    return recipe.dense is not None or upcycled


def _too_few(tokens: int, model: Model) -> tuple[str, str]:
    what = f"{tokens} tokens are less than one sequence ({model.seq_length})"
    return what, f"give at least {model.seq_length}"
