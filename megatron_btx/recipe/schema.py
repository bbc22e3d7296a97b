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
    """Held-out tokens a domain, at most; whole sequences."""
    micro_batch_size: int = within(1, 10**6, default=16)
    """Sequences a rank runs at once."""
    layout: Layout = Layout()
    """The evaluation's ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """The finished MoE as a Hugging Face directory."""

    format: Literal["hf", "none"] = "hf"
    """``none`` leaves it out."""
    check: bool = True
    """Compare the loss with ``transformers`` where it is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandB:
    """Weights & Biases; the JSONL metrics are written either way."""

    mode: Literal["disabled", "offline", "online"] = "offline"
    """``online`` needs a key in the environment."""
    project: str = "megatron-btx"
    """Name of the project."""
    entity: str | None = None
    """User or team; ``None``: the key's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmJob:
    """What a stage's job asks of Slurm. An empty field leaves the choice to the site, or to the
    block around this one. Whatever is written here reaches Slurm as one word: it runs nothing."""

    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features of the nodes."""
    time: str | None = None
    """``"24:00:00"``, ``"2-12:00:00"`` (in quotes), or minutes."""
    nodes: int | None = within(1, 10**6, default=None)
    """``None``: as few as the layout's ranks need, at ``gpus_per_node`` to a node; without GPUs
    one."""
    gpus_per_node: int | None = within(0, 10**6, default=None)
    """GPUs of a node, a rank each. Stages that train nothing ask for none unless it stands in their
    own block."""
    gpu_type: str | None = None
    """``h100``: asks for ``h100:8`` instead of ``8``."""
    cpus_per_task: int | None = within(1, 10**6, default=None)
    """Cores a rank; ``None``: the layout's ``num_threads``."""
    mem: str | None = None
    """Memory of a node, ``"200G"``; ``"0"``: all of it."""
    tasks: int | None = within(1, 100_000, default=None)
    """``prepare`` only: an array of so many jobs tokenizes the text, each with ``cpus_per_task``
    cores. ``None``: one job does."""
    sbatch: tuple[str, ...] | None = None
    """More flags of sbatch, a word each: ``["--mail-type=END", "--reservation=x"]``."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the job; values are text. Keys and tokens are refused: the jobs
    inherit the environment from which they are submitted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slurm(SlurmJob):
    """How `btx submit` runs the stages. Where and how, not what: nothing here is in any key."""

    stages: dict[str, SlurmJob] = field(default_factory=dict)
    """Per kind or stage (``expert``, ``expert:math``, ``finetune``), key by key over the rest."""
    modules: tuple[str, ...] = ()
    """Environment modules to load."""
    python: str | None = None
    """Interpreter of the ranks; ``None``: the one that submits. In a container, ``python3``."""
    launch_prefix: str = ""
    """Stands between ``srun`` and the interpreter, split into words and nothing more: flags of srun
    (pyxis) or a command (``apptainer exec --nv image.sif``)."""
    signal_seconds: int = within(1, 65_535, default=180)
    """So long before its time limit a job is told to save. Slurm looks every half minute."""
    max_restarts: int = within(0, 65_535, default=100)
    """Requeues of one job at most; three in a row without progress end it before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One Branch-Train-MiX run, from text to a table."""

    name: str
    """The run's name."""
    run_dir: str = run_path("runs/{name}")
    """Everything the run writes; ``{name}`` is the recipe's."""
    random_seed: int = within(0, 2**31 - 1, default=1234)
    """Of weights, data order and sampling."""
    system: Literal["seed", "experts", "dense", "upcycling", "btm", "btx"] = "btx"
    """Which of the paper's systems it is (systems.py); what they share is made once."""
    match: Literal["data", "compute"] = "data"
    """``data``: every system is trained on the same text; an upcycled seed on what experts and
    finetuning together read, in the dense baseline's order. ``compute``: the finetuning's mixture
    lasts until the system has cost the training FLOPs of BTX with top-2 routing (section 4.1.2), of
    the dense baseline behind the experts' data; without a finetuning (btm, experts) every expert
    is trained on its own mixture for longer, each by the same factor."""
    model: Model
    """The dense models."""
    tokenizer: TokenizerBlock = TokenizerBlock()
    """How text becomes tokens."""
    domains: dict[str, Domain]
    """Every body of text by name; the order is the order of the table's columns."""
    seed: Training
    """The stage that makes the model from which the experts branch."""
    experts: dict[str, Training]
    """One stage per domain, trained independently from the seed (sections 3.1, 4.1.1)."""
    mix: Mix = Mix()
    """How the experts become one MoE."""
    routing: Routing = Routing()
    """How the MoE's tokens choose experts."""
    finetune: Training
    """The stage that trains the MoE."""
    dense: Training | None = None
    """The dense baseline (section 4.1.2), matched as ``match`` says; ``None`` leaves it out. Its
    ``tokens`` and ``data`` are derived: the experts' data first, then the finetune mixture."""
    btm: BTM = BTM()
    """Branch-Train-Merge; of `system: btm`."""
    evaluate: Evaluate = Evaluate()
    """Held-out losses."""
    export: Export = Export()
    """The result for others."""
    wandb: WandB = WandB()
    """Where metrics go."""
    slurm: Slurm = Slurm()
    """How `btx submit` runs the stages."""
    share: tuple[str, ...] = run_path(())
    """Run directories, ``*`` allowed: what is finished there under the same key is linked here
    instead of made again."""
    max_parallel_jobs: int | None = within(1, default=None)
    """Independent stages run side by side on this machine; ``None``: as many as its cores hold."""
    peak_tflops: float | None = within(1e-6, 1e6, default=None)
    """Peak of one GPU or rank in TFLOP/s, for MFU; ``None``: looked up (chips.py)."""
    hang_minutes: float = within(0, 100_000, default=60.0)
    """A rank that trains without a step, or evaluates without a micro-batch, for so long, its first
    included, hangs: all print their stacks, the stage ends, on Slurm it is requeued. 0: never."""

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
