"""What a run is: frozen dataclasses, one per block of the recipe's YAML. Those of models,
training and mixing are in files of their own, and are imported from here.

Field names that Megatron-Core has are Megatron-Core's (``num_moe_experts``, ``moe_router_topk``,
``tensor_model_parallel_size``). Defaults are the paper's where the paper states a value
(arXiv 2403.07816, section 4.1 and appendix), Llama-2's where the paper points there.
This module imports no torch: a recipe is read, checked and planned on a login node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_btx.recipe.fields import run_path, within
from megatron_btx.recipe.schema_mix import BTM, Mix, Routing
from megatron_btx.recipe.schema_training import (
    Domain,
    Layout,
    MegatronOptions,
    Model,
    Precision,
    TokenizerBlock,
    Training,
)

__all__ = [
    "BTM", "Domain", "Evaluate", "Export", "Layout", "MegatronOptions", "Mix", "Model", "Precision",
    "Recipe", "Routing", "Slurm", "SlurmJob", "TokenizerBlock", "Training", "WandB",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Held-out loss of every system on every domain."""

    tokens: int = within(1, default=262_144)
    """Held-out tokens per domain, at most; whole sequences only."""
    micro_batch_size: int = within(1, 10**6, default=16)
    """Sequences per rank and forward pass."""
    layout: Layout = Layout()
    """Layout of the evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The finished MoE as a Hugging Face directory."""

    format: Literal["hf", "none"] = "hf"
    """``none``: no export."""
    check: bool = True
    """Compare the held-out loss with that of ``transformers``, if it is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandB:
    """Weights & Biases; the JSONL metrics are written either way."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    """``online`` needs a W&B API key in the environment."""
    project: str = "megatron-btx"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; ``None``: the default of the API key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What a stage's job requests from Slurm. An empty field leaves the choice to the site, or to
    the enclosing block. Every value is passed to Slurm as one word and is never executed."""

    partition: str | None = None
    """Slurm partition."""
    account: str | None = None
    """Slurm account."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Required features of the nodes."""
    time: str | None = None
    """Time limit: ``"24:00:00"``, ``"2-12:00:00"`` (in quotes), or minutes."""
    nodes: int | None = within(1, 10**6, default=None)
    """Number of nodes. ``None``: as few as the ranks of the layout need with ``gpus_per_node``
    ranks per node; one node without GPUs."""
    gpus_per_node: int | None = within(0, 10**6, default=None)
    """GPUs per node, one per rank. Stages that train nothing request none unless their own block
    sets it."""
    gpu_type: str | None = None
    """GPU type: ``h100`` requests ``h100:8`` instead of ``8``."""
    cpus_per_task: int | None = within(1, 10**6, default=None)
    """Cores per rank; ``None``: the ``num_threads`` of the layout."""
    mem: str | None = None
    """Memory per node, ``"200G"``; ``"0"``: all of it."""
    tasks: int | None = within(1, 100_000, default=None)
    """``prepare`` only: tokenize with an array of this many jobs, each with ``cpus_per_task``
    cores. ``None``: with one job."""
    sbatch: tuple[str, ...] | None = None
    """Further flags of sbatch, one list entry each: ``["--mail-type=END", "--reservation=x"]``."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the job; values are text. Keys and tokens (secrets) are refused:
    jobs inherit the environment in which they are submitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm(SlurmJob):
    """How `btx submit` runs the stages. None of this is part of a stage's key."""

    stages: dict[str, SlurmJob] = field(default_factory=dict)
    """Settings per kind of stage or per stage (``expert``, ``expert:math``, ``finetune``); they
    override the others key by key."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    python: str | None = None
    """Python interpreter of the ranks; ``None``: the one that runs `btx submit`. In a container,
    ``python3``."""
    launch_prefix: str = ""
    """Inserted between ``srun`` and the interpreter, split into words and not otherwise
    interpreted: flags of srun (pyxis) or a command (``apptainer exec --nv image.sif``)."""
    signal_seconds: int = within(1, 65_535, default=180)
    """A job is told to save this many seconds before its time limit. Slurm checks every half
    minute."""
    max_restarts: int = within(0, 65_535, default=100)
    """Maximum number of requeues of a job; it is also ended after three in a row without
    progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One Branch-Train-MiX run, from text to a table."""

    name: str
    """Name of the run."""
    run_dir: str = run_path("runs/{name}")
    """Directory of everything that the run writes; ``{name}`` stands for the recipe's name."""
    random_seed: int = within(0, 2**31 - 1, default=1234)
    """Random seed of weights, data order and sampling."""
    system: Literal["seed", "experts", "dense", "upcycling", "btm", "btx"] = "btx"
    """Which system of the paper is trained (systems.py). Systems share the stages that they have
    in common."""
    match: Literal["data", "compute"] = "data"
    """``data``: all systems are trained on the same text; the upcycled seed on the text of experts
    and finetuning, in the order of the dense baseline. ``compute``: the finetuning continues on
    its mixture until the system has used the training FLOPs of BTX with top-2 routing (section
    4.1.2), the dense baseline likewise after the data of the experts; without a finetuning (btm,
    experts) every expert is trained longer on its own mixture, all by the same factor."""
    model: Model
    """Shape of the dense models."""
    tokenizer: TokenizerBlock = TokenizerBlock()
    """The tokenizer."""
    domains: dict[str, Domain]
    """The text of each domain by name; also the order of the columns in tables."""
    seed: Training
    """The stage that trains the seed model, from which the experts are branched."""
    experts: dict[str, Training]
    """One stage per expert, trained independently from the seed (sections 3.1, 4.1.1)."""
    mix: Mix = Mix()
    """How the experts are mixed into one MoE."""
    routing: Routing = Routing()
    """How the MoE routes tokens to experts."""
    finetune: Training = Training()
    """The stage that trains the MoE; a system without an MoE needs none."""
    dense: Training | None = None
    """The dense baseline (section 4.1.2), matched according to ``match``; ``None``: none. Its
    ``tokens`` and ``data`` are derived: first the data of the experts, then the mixture of the
    finetuning."""
    btm: BTM = BTM()
    """Branch-Train-Merge; for `system: btm`."""
    evaluate: Evaluate = Evaluate()
    """The final held-out evaluation."""
    export: Export = Export()
    """Export of the finished model."""
    wandb: WandB = WandB()
    """Weights & Biases."""
    slurm: Slurm = Slurm()
    """How `btx submit` runs the stages."""
    share: tuple[str, ...] = run_path(())
    """Run directories, ``*`` allowed. A stage that is finished there under the same key is linked
    instead of run again."""
    max_parallel_jobs: int | None = within(1, default=None)
    """How many independent stages run at the same time on this machine; ``None``: as many as its
    cores allow."""
    peak_tflops: float | None = within(1e-6, 1e6, default=None)
    """Peak TFLOP/s of one GPU or rank, for MFU; ``None``: from a table (chips.py)."""
    hang_minutes: float = within(0, 100_000, default=60.0)
    """A rank counts as hanging if it has finished no training step, or no micro-batch of an
    evaluation, for this long (its first included). All ranks then print their stacks, the stage
    ends, and Slurm requeues it. 0: never."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models that are mixed, in their order."""
        if self.mix.method == "upcycle":
            return ("seed",)
        return (*self.experts, "seed") if self.mix.include_seed else tuple(self.experts)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts of the MoE, in their order."""
        return self.mix.expert_names(self.model_names)

    @property
    def num_moe_experts(self) -> int:
        """Experts of the MoE: N of the paper where ``mix.method`` is ``btx``."""
        return len(self.expert_names)
