"""A recipe to begin with, from checkpoints and text: what ``btx init --seed`` writes.

What the paper fixes (arXiv 2403.07816, section 4.1) is taken from it; what must fit the tokens that
there are (batch, warm-up, intervals) and the ranks (layout) is worked out here, and said in
comments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_btx.errors import UserError, UserErrors
from megatron_btx.recipe.key_reference import model_block
from megatron_btx.recipe.load import parse_recipe
from megatron_btx.recipe.run_plan import human, plan
from megatron_btx.recipe.schema import Layout, Model, Recipe

PAPER_BATCH = 1024 * 4096
"""Tokens of a step (section 4.1)."""
PAPER_FINETUNE = 80 / 453
"""Tokens of the finetuning for each of the experts' (section 4.1.1)."""
STEPS = 2000
"""So many steps are aimed at where there are fewer tokens than the paper's batches would need."""
EPOCHS = 4
"""As often any text is read at most: beyond, repeated text is worth little (arXiv 2305.16264)."""
OWN = 0.95
"""An expert's own domain in its mixture; the rest keeps what the seed knows (table 7)."""
FITS = 0.9
"""Share of a GPU's memory that the planned peak may take."""
_NOT_EXPORTED = "export: {format: none} # no Hugging Face family computes the mixture"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A domain's."""

    train: tuple[Path, ...]
    valid: tuple[Path, ...] = ()
    tokens: int
    """There are, about."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is there to begin with."""

    name: str
    model: Model
    """The seed's, its ``seq_length`` that of the training."""
    seed: Path
    experts: dict[str, Path | None]
    """In their order; ``None``: to be trained from the seed on the domain of its name."""
    domains: dict[str, Text]
    tokenizer: Path | None = None
    """``None``: the seed's own."""
    align_vocab: bool = False
    exported: bool = True
    """``False``: no Hugging Face family computes the mixture."""
    gpus: int = 0
    """Ranks, a GPU each; 0: ranks of ``cores`` cores."""
    gpu_bytes: float = 80e9
    cores: int = 1


def compose(start: Start, path: Path) -> str:
    """The recipe, as YAML with comments.

    Args:
        start: what there is.
        path: where it will lie; what is named inside lies relative to there, or is absolute.

    Raises:
        UserErrors: too little text, or no layout in which the model fits the GPUs.
    """
    wrong: list[UserError] = []
    for layout in _layouts(start):
        text = _text(start, layout, path)
        try:
            recipe = parse_recipe(text, path)
        except UserErrors as errors:
            wrong = wrong or errors.errors
            continue
        if not start.gpus or _largest(recipe) <= FITS * start.gpu_bytes:
            return text
        wrong = [_too_large(start, recipe)]
    raise UserErrors(wrong)


def _largest(recipe: Recipe) -> int:
    """Bytes of the rank that needs most, of all stages that train."""
    return max(s.memory_per_rank.allocated for s in plan(recipe).stages if s.taken_from is None)


def _too_large(start: Start, recipe: Recipe) -> UserError:
    what = (
        f"{start.gpus} GPUs of {start.gpu_bytes / 1e9:g} GB are too few: under every layout a rank "
        f"needs more, {_largest(recipe) / 1e9:.3g} GB under the widest"
    )
    return UserError("--gpus", what, "name more of them, or a shorter --seq-length")


def _layouts(start: Start) -> Iterator[Layout]:
    """Candidates, the least divided first: experts over all ranks that they divide, then tensor,
    then pipeline parallelism."""
    experts = len(start.experts) + 1
    ranks = start.gpus or min(2 - experts % 2, start.cores)
    sizes = [(tp, pp) for pp in (1, 2, 4, 8) for tp in (1, 2, 4, 8) if ranks % (tp * pp) == 0]
    for tp, pp in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
        if (tp, pp) != (1, 1) and not start.gpus:
            return
        dp = ranks // (tp * pp)
        ep = max(n for n in range(1, experts + 1) if experts % n == 0 and dp % n == 0)
        yield Layout(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            data_parallel_size=dp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1 if tp > 1 else None,
        )


@dataclass(frozen=True)
class _Schedule:
    """In tokens, sequences and steps."""

    finetune: int
    experts: dict[str, int]
    batch: int
    micro: int

    def steps(self, tokens: int, seq_length: int) -> int:
        return -(-tokens // (self.batch * seq_length))


def _schedule(start: Start, dp: int) -> _Schedule:
    tokens = {name: text.tokens for name, text in start.domains.items()}
    experts = {
        name: min(int(tokens[name] / OWN), EPOCHS * tokens[name])
        for name, taken in start.experts.items()
        if taken is None
    }
    finetune = min(sum(tokens.values()), EPOCHS * len(tokens) * min(tokens.values()))
    if experts:
        finetune = min(finetune, int(PAPER_FINETUNE * sum(experts.values())))
    least = min([finetune, *experts.values()])
    seq = start.model.seq_length
    wanted = min(PAPER_BATCH, least // STEPS) // seq
    micro = 1 if start.gpus else max(n for n in (1, 2, 4, 8) if n * dp <= max(wanted, dp))
    batch = max(wanted // (micro * dp), 1) * micro * dp
    if batch * seq > least:
        what = f"there are {least:,} tokens for a stage, and one step takes {batch * seq:,}"
        raise UserErrors([UserError("--data", what, "give more text, or a shorter --seq-length")])
    return _Schedule(finetune, experts, batch, micro)


def _text(start: Start, layout: Layout, path: Path) -> str:
    schedule = _schedule(start, layout.data_parallel_size)
    seq, here = start.model.seq_length, path.absolute().parent
    stages = [schedule.finetune, *schedule.experts.values()]
    steps = [schedule.steps(tokens, seq) for tokens in stages]
    warmup = min(100, max(1, min(steps) // 20))
    model = "".join(f"{line}\n" for line in model_block(start.model).splitlines()[1:])
    tokenizer = "# tokenizer: the seed's own, which comes with it\n"
    if start.tokenizer is not None:
        tokenizer = f"tokenizer: {{path: {_path(start.tokenizer, here)}}}\n"
    lines = [
        "# Written by `btx init`. `btx plan` says what it costs, `btx keys KEY` what a key means,",
        "# `btx run` does it. What has no comment is the paper's (arXiv 2403.07816, section 4.1).",
        f"name: {start.name}",
        "",
        f"model: # of {_comment(start.seed)}; seq_length is that of a training sequence",
        model + "\n" + tokenizer,
        "domains: # without `valid:` a part of the text is held out",
        *(_domain(name, text, here) for name, text in start.domains.items()),
        "",
        "training: # of every stage that is trained here",
        f"  global_batch_size: {schedule.batch} # x {seq} tokens; the paper's step is 4M tokens",
        f"  micro_batch_size: {schedule.micro}",
        "  lr: 1e-4",
        "  min_lr: 1e-5",
        f"  lr_warmup_iters: {warmup} # the paper's is 100, of 10,000 steps and more",
        f"  precision: {'bf16' if start.gpus else 'fp32'}",
        f"  save_interval: {max(1, min(1000, min(steps) // 5))}",
        f"  eval_interval: {max(1, min(1000, min(steps) // 5))}",
        f"  eval_tokens: {max(65_536, seq)}",
        *(["  use_distributed_optimizer: true"] if layout.data_parallel_size > 1 else []),
        f"  layout: {_layout(layout, experts=False)}{_machine(start)}",
        "",
        f"seed: {{from: {_path(start.seed, here)}}}",
        "",
        "experts: # in the order of the mixture's experts; the seed is the last",
        *(_expert(start, name, schedule, here) for name in start.experts),
        "",
        *(["mix: {align_vocab: true} # the largest of the vocabularies", ""] * start.align_vocab),
        "routing: {type: topk, moe_router_topk: 2}",
        "",
        f"finetune: # {schedule.steps(schedule.finetune, seq):,} steps",
        f"  tokens: {schedule.finetune:_} # {_why(schedule)}",
        f"  data: {_weights(dict.fromkeys(start.domains, 1.0))} # equal shares",
        f"  layout: {_layout(layout, experts=True)}",
        "",
        "evaluate:",
        f"  tokens: {max(262_144, seq)}",
        "  micro_batch_size: 1" if start.gpus else "  micro_batch_size: 8",
        f"  layout: {_layout(layout, experts=True)}",
        "",
        *([_NOT_EXPORTED, ""] * (not start.exported)),
        "# dense: {} # the seed trained on the same tokens without experts, to compare with",
        '# slurm: {partition: NAME, gpus_per_node: 8, time: "24:00:00"} # for `btx submit`',
    ]
    return "\n".join(lines) + "\n"


def _why(schedule: _Schedule) -> str:
    if schedule.experts:
        return "for each of the experts' as many as in the paper, 80 to 453"
    return f"the text there is; no domain more than {EPOCHS} times"


def _machine(start: Start) -> str:
    if not start.gpus:
        return " # on CPUs; name GPUs by --gpus"
    return f" # {start.gpus} GPUs of {start.gpu_bytes / 1e9:g} GB"


def _domain(name: str, text: Text, here: Path) -> str:
    parts = {"train": text.train, "valid": text.valid}
    said = ", ".join(
        f"{key}: [{', '.join(_path(path, here) for path in paths)}]"
        for key, paths in parts.items()
        if paths
    )
    return f"  {name}: {{{said}}} # about {human(text.tokens)} tokens"


def _expert(start: Start, name: str, schedule: _Schedule, here: Path) -> str:
    taken = start.experts[name]
    if taken is not None:
        return f"  {name}: {{from: {_path(taken, here)}}}"
    general = next((other for other in start.domains if other not in start.experts), None)
    data = {name: OWN, general: round(1 - OWN, 2)} if general else {name: 1.0}
    tokens = schedule.experts[name]
    steps = schedule.steps(tokens, start.model.seq_length)
    return f"  {name}: {{tokens: {tokens:_}, data: {_weights(data)}}} # {steps:,} steps"


def _weights(data: dict[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {weight:g}" for name, weight in data.items()) + "}"


def _layout(layout: Layout, *, experts: bool) -> str:
    sizes = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "data_parallel_size": layout.data_parallel_size,
    }
    if experts:
        sizes["expert_model_parallel_size"] = layout.expert_model_parallel_size
        sizes["expert_tensor_parallel_size"] = layout.expert_tensor_parallel_size or 1
    said = [f"{name}: {size}" for name, size in sizes.items() if size > 1 or name[0] == "d"]
    if experts and layout.tensor_model_parallel_size > 1:
        said.append("expert_tensor_parallel_size: 1")
    return "{" + ", ".join(said) + "}"


def _path(path: Path, here: Path) -> str:
    """As YAML: relative where it lies below the recipe."""
    whole = Path(os.path.abspath(path))
    named = whole.relative_to(here) if whole.is_relative_to(here) else whole
    return json.dumps(str(named), ensure_ascii=False)


def _comment(path: Path) -> str:
    """A path inside a comment: on one line."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1]
