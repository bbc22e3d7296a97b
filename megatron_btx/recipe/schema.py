"""What a run is: frozen dataclasses, one per block of the recipe's YAML.

Field names that Megatron-Core has are Megatron-Core's (``num_moe_experts``, ``moe_router_topk``,
``tensor_model_parallel_size``). Defaults are the paper's where the paper states a value
(arXiv 2403.07816, section 4.1 and appendix), Llama-2's where the paper points there.
This module imports no torch: a recipe is read, checked and planned on a login node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_btx.recipe.fields import path, renamed, within

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The shape of the dense seed: RMSNorm, SwiGLU and rotary positions, as in Llama, and by the
    fields at the end as in its relatives (Llama 3, Mistral, Qwen)."""

    num_layers: int = within(1, 10_000)
    """Transformer layers."""
    hidden_size: int = within(1, 10**6)
    """Width of a token's hidden state."""
    ffn_hidden_size: int = within(1, 10**7)
    """Inner width of the feed-forward layer."""
    num_attention_heads: int = within(1, 10**5)
    """Query heads."""
    num_query_groups: int | None = within(1, 10**5, default=None)
    """Key/value heads (grouped-query attention); ``None``: as many as ``num_attention_heads``."""
    kv_channels: int | None = within(1, 10**5, default=None)
    """Width of a head; ``None``: ``hidden_size / num_attention_heads``."""
    seq_length: int = within(1, 10**9, default=4096)
    """Tokens of a training sequence."""
    rotary_base: float = within(1, default=10000.0)
    """Base of the rotary frequencies (`rope_theta`)."""
    layernorm_epsilon: float = within(1e-12, 0.01, default=1e-5)
    """RMSNorm's epsilon."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has weights of its own; `false`: it is the embedding."""
    init_method_std: float = within(0, 10, default=0.02)
    """Standard deviation of the normal draws that initialise the weights."""
    make_vocab_size_divisible_by: int = within(1, 10**6, default=128)
    """The vocabulary is padded to a multiple of this, and of nothing else: a checkpoint's shapes
    never depend on the layout that wrote it. Tensor parallelism must divide the padded size."""
    max_position_embeddings: int | None = within(1, 10**9, default=None)
    """The longest sequence that the model was made for, kept for its export; ``None``:
    ``seq_length``."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm over every head's queries and keys (Qwen3)."""
    rope_scaling: bool = False
    """Llama 3's stretching of the slow rotary frequencies, as Megatron computes it: from 8192
    positions, low and high factors 1 and 4."""
    rope_scaling_factor: float = within(1, default=8.0)
    """By how much: 8 in Llama 3.1, 32 in Llama 3.2."""
    seq_len_interpolation_factor: float | None = within(1, default=None)
    """Positions are divided by this (linear scaling, arXiv 2306.15595)."""
    window_size: tuple[int, ...] | None = within(0, 10**9, default=None)
    """Sliding window: ``[n, 0]`` lets a token see the n before it and itself (Mistral's
    ``sliding_window`` is n + 1)."""
    window_attn_skip_freq: tuple[int, ...] | None = within(0, 1, default=None)
    """1 for every layer with the window, 0 for one that sees everything; ``None``: all with it."""
    moe_ffn_hidden_size: int | None = within(1, 10**7, default=None)
    """Width of an expert in an MoE that was not mixed here; ``None``: ``ffn_hidden_size``."""
    moe_shared_expert_intermediate_size: int | None = within(1, 10**7, default=None)
    """Width of such an MoE's shared expert, which every token meets; ``None``: it has none."""
    moe_shared_expert_gate: bool = False
    """Whether a sigmoid gate scales the shared expert's output (Qwen2-MoE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerBlock:
    """SentencePiece (trained by the recipe or given) or a Hugging Face tokenizer."""

    type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """Which of the two."""
    path: str | None = path()
    """A ``.model`` file or a Hugging Face directory. ``None``: train SentencePiece on the seed's
    data, or take the tokenizer that comes with ``seed.from``."""
    vocab_size: int = within(1, 10**8, default=32000)
    """Pieces to train; with a given ``path`` the tokenizer's own size counts."""
    train_bytes: int = within(1, default=20_000_000)
    """At most this much text, taken evenly from the seed's domains, trains the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One body of text: files, directories of them and prefixes of Megatron's ``.bin`` / ``.idx``
    pairs (docs/data.md), or a corpus every machine has."""

    train: tuple[str, ...] = path(())
    """Training text."""
    valid: tuple[str, ...] = path(())
    """Held-out text; without it, a part of the training text is held out."""
    weights: tuple[float, ...] = within(1e-9, 1e9, default=())
    """How much of what is read comes from each path of ``train`` (normalised); none: by tokens."""
    text_key: str = "text"
    """Key of the text in JSON, column in Parquet and Arrow."""
    builtin: Literal["general", "code", "math", "prose"] | None = None
    """Text found on this machine (megatron_btx/data/builtin/corpora.py) instead of files."""
    builtin_bytes: int = within(1, default=6_000_000)
    """At most this much built-in training text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a job's ranks divide a model, in Megatron's terms. World size = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = within(1, 10**6, default=1)
    """TP: ranks that divide every matrix."""
    pipeline_model_parallel_size: int = within(1, 10**6, default=1)
    """PP: ranks that divide the layers."""
    context_parallel_size: int = within(1, 10**6, default=1)
    """CP: 1, anything else is refused."""
    data_parallel_size: int = within(1, 10**6, default=1)
    """DP: replicas, each with its part of the batch."""
    expert_model_parallel_size: int = within(1, 10**6, default=1)
    """EP: ranks that divide the experts; of the finetuning only."""
    expert_tensor_parallel_size: int | None = within(1, 10**6, default=None)
    """``None``: as ``tensor_model_parallel_size``, Megatron's own default."""
    sequence_parallel: bool | None = None
    """``None``: on where tensor parallelism meets experts (Megatron requires it there)."""
    num_threads: int = within(1, 10**6, default=1)
    """CPU threads a rank. Fixed in the recipe: bit-for-bit resume depends on it."""

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
            * self.data_parallel_size
        )

    @property
    def etp(self) -> int:
        """Expert tensor parallel size with its default resolved."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOptions:
    """Fields handed unchanged to Megatron's own dataclasses; every key is checked against them."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """``TransformerConfig`` (with ``ModelParallelConfig``): recompute_granularity, ..."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """``DistributedDataParallelConfig``: overlap_grad_reduce, bucket_size, ..."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """``OptimizerConfig``: overlap_param_gather, log_num_zeros_in_grad, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training stage. Optimiser settings default to the paper's (section 4.1): AdamW, weight
    decay 0.1, peak learning rate 1e-4, 100 warm-up steps, cosine decay to a tenth; betas, epsilon
    and clipping are Llama-2's (arXiv 2307.09288, section 2.2), which the paper refers to."""

    tokens: int = within(0, default=0)
    """Training tokens; rounded up to whole steps of ``global_batch_size * seq_length``."""
    data: dict[str, float] = field(default_factory=dict)
    """Domain -> sampling weight (normalised)."""
    global_batch_size: int = within(1, 10**9, default=1024)
    """Sequences a step, over all ranks."""
    micro_batch_size: int = within(1, 10**6, default=1)
    """Sequences a rank runs at once."""
    lr: float = within(1e-12, 10, default=1e-4)
    """Peak learning rate."""
    min_lr: float | None = within(0, 10, default=None)
    """``None``: a tenth of ``lr``."""
    lr_warmup_iters: int = within(0, default=100)
    """Steps of linear warm-up."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root"] = "cosine"
    """How the learning rate falls from its peak to `min_lr`."""
    weight_decay: float = within(0, 100, default=0.1)
    """AdamW's."""
    adam_beta1: float = within(0, 0.999999, default=0.9)
    """AdamW's decay of the first moment."""
    adam_beta2: float = within(0, 0.9999999, default=0.95)
    """AdamW's decay of the second moment."""
    adam_eps: float = within(1e-20, 1, default=1e-5)
    """AdamW's epsilon."""
    clip_grad: float = within(0, default=1.0)
    """Largest norm of the gradient; 0: not clipped."""
    precision: Precision = "bf16"
    """Of parameters and products; the optimizer keeps fp32 copies."""
    use_distributed_optimizer: bool = False
    """Divide the optimizer state over data-parallel ranks."""
    layout: Layout = Layout()
    """The stage's ranks."""
    save_interval: int = within(1, default=1000)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = within(1, default=2)
    """Whole checkpoints kept for resuming; the final one is kept for the stages that follow."""
    eval_interval: int = within(0, default=1000)
    """Steps between held-out evaluations during training; 0: only at the end."""
    eval_tokens: int = within(1, default=65_536)
    """Held-out tokens a domain for those, at most."""
    check_replicas_interval: int = within(0, default=100)
    """Steps between hashes of replicated parameters across ranks; 0: never."""
    freeze_experts: bool = False
    """The finetuning only: attention, routers and the rest learn, the experts stay as they are (an
    ablation of section 4.3.2)."""
    reset_position_ids: bool = False
    """Megatron's: positions begin anew with each document of a sequence. Refused where true, as
    the two below (docs/data.md)."""
    reset_attention_mask: bool = False
    """Megatron's: a token sees its own document only."""
    eod_mask_loss: bool = False
    """Megatron's: what follows an end token is not predicted."""
    megatron: MegatronOptions = MegatronOptions()
    """Options of Megatron's own."""
    from_: str | None = path()
    """A Megatron ``torch_dist`` directory (with its manifest) or a Hugging Face directory to take
    instead of training. Written ``from:`` in the YAML."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """The routing function g and its balance loss (sections 3.2, 3.3 and 4.3.1)."""

    type: Literal["topk", "switch", "sample_top1", "soft"] = "topk"
    """The routing function."""
    moe_router_topk: int = within(1, 10_000, default=2)
    """k of ``topk``; the other types fix it (switch and sample_top1: 1; soft: all experts)."""
    moe_router_pre_softmax: bool = False
    """``topk``: softmax over all experts, then the k best as they are, so that gates do not sum to
    one (Qwen's MoEs). The paper's is the softmax over the k best."""
    balance_loss_coeff: float = within(0, 1000, default=0.01)
    """alpha of L_LB = alpha N sum_i u_i p_i (section 3.3), in every layer."""
    moe_expert_capacity_factor: float = within(0.01, default=1.5)
    """``switch`` only (section 3.3): tokens over capacity are dropped."""
    temperature_min: float = within(1e-6, default=0.5)
    """``sample_top1``: the lowest temperature."""
    temperature_rate: float = within(0, default=1e-4)
    """``sample_top1``: tau = max(temperature_min, exp(-temperature_rate * step))."""
    first_layer_soft: bool = True
    """``sample_top1``: the first layer routes softly (section 3.3)."""
    greedy: bool = False
    """``sample_top1`` at inference: the argmax instead of a seeded draw."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Megatron's own balance losses, beside the paper's."""
    moe_aux_loss_coeff: float = within(0, 1000, default=0.0)
    """Weight of Megatron's own balance loss."""
    moe_z_loss_coeff: float | None = within(0, 1000, default=None)
    """Weight of the router's z-loss; ``None``: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How dense models become one MoE (sections 3.2 and 3.3)."""

    method: Literal["btx", "split", "blend", "upcycle"] = "btx"
    """``btx``: each model's FFN is an expert. ``split``: each is cut into ``num_chunks`` experts.
    ``blend``: as many experts as models, each holding a part of every model. ``upcycle``: copies of
    the seed alone."""
    include_seed: bool = True
    """The untouched seed is one more expert, the generalist (section 4.1.1). It comes last."""
    copies: int = within(1, 1000, default=8)
    """``upcycle``: experts, or virtual groups of them where ``num_chunks`` is more than 1."""
    num_chunks: int = within(1, 1000, default=1)
    """C, the experts that each FFN is cut into, ``ffn_hidden_size / C`` wide: of ``split``, and of
    a granular ``upcycle``."""
    scale: Literal["down", "cube_root", "none"] = "down"
    """What makes up for the cutting: C on the down matrices; the rule of arXiv 2410.07524
    (``upcycle`` only); nothing, the paper's silence."""
    average: Literal["uniform", "tokens"] | dict[str, float] = "uniform"
    """Weights of the average of all that is not a feed-forward layer: uniform as in the paper, by
    the tokens that each model was trained on since the seed (the seed itself: none), or by model
    name (``seed`` and the domains), normalised."""
    average_groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Other weights for ``embeddings``, ``attention``, ``norms`` or ``head``."""
    dare: float | None = within(0, 0.999, default=None)
    """Share of the differences from the seed that DARE drops before averaging, rescaling the rest
    (arXiv 2311.03099)."""
    ties: float | None = within(1e-6, 1, default=None)
    """Share of the differences from the seed that TIES keeps of each tensor, the largest, before
    it elects a sign for each element and averages what agrees (arXiv 2306.01708)."""
    fold_norms: bool = False
    """``btx``: fold the ratio of each expert's own pre-FFN norm gain to the averaged one into its
    gate and up matrices."""
    noise: float = within(0, 100, default=0.0)
    """``upcycle``: standard deviation of normal noise added to every expert."""
    drop_ratio: float = within(0, 1, default=0.0)
    """``upcycle``: share of each expert's inner units that are drawn anew (Drop-Upcycling, arXiv
    2502.19261)."""
    router_init: Literal["normal", "zeros", "uniform", "centroids", "ridge"] = "normal"
    """The paper does not give one; normal draws of ``router_init_std`` by default, whatever the
    model's ``init_method_std`` is. ``centroids``: each expert's row points to where its domain's
    hidden states are; ``ridge``: the rows solve the ridge regression of the domain on them (DUME,
    arXiv 2603.29765)."""
    router_init_std: float = within(0, 100, default=0.02)
    """Standard deviation, or half the width of the interval."""
    centroids: str | None = path()
    """The file of ``btx centroids``, for ``router_init: centroids`` or ``ridge``."""

    def expert_names(self, models: Sequence[str]) -> tuple[str, ...]:
        """The experts that become of dense models, in the MoE's order."""
        if self.method == "blend":
            return tuple(f"blend.{part}" for part in range(len(models)))
        if self.method == "upcycle":
            models = [f"{model}.{copy}" for model in models for copy in range(self.copies)]
        if self.chunks == 1:
            return tuple(models)
        return tuple(f"{model}.{part}" for model in models for part in range(self.chunks))

    @property
    def chunks(self) -> int:
        """How many experts become of one feed-forward layer: how much narrower they are."""
        return self.num_chunks if self.method in ("split", "upcycle") else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BTM:
    """Branch-Train-Merge (arXiv 2208.03306): the experts and the seed as an ensemble."""

    method: Literal["top1", "top2", "posterior", "average"] = renamed("top2", "select")
    """The experts nearest to a text by tf-idf, as in the BTX paper (section 4.1.2); all of them by
    the posterior of their domains, as in BTM's own; or one model, the average of their weights."""


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
    run_dir: str = "runs/{name}"
    """Everything the run writes; ``{name}`` is the recipe's."""
    random_seed: int = within(0, 2**31 - 1, default=1234)
    """Of weights, data order and sampling."""
    system: Literal["seed", "experts", "dense", "upcycling", "btm", "btx"] = "btx"
    """Which of the paper's systems it is (systems.py); what they share is made once."""
    match: Literal["data", "compute"] = "data"
    """``data``: every system is trained on the same text; an upcycled seed on what experts and
    finetuning together read, in the dense baseline's order. ``compute``: the finetuning's mixture
    lasts until the system has cost the training FLOPs of BTX with top-2 routing (section 4.1.2)."""
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
    """The data-matched dense baseline (section 4.1.2); ``None`` leaves it out. Its ``tokens`` and
    ``data`` are derived: the experts' data first, then the finetune mixture."""
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
    share: tuple[str, ...] = ()
    """Run directories, ``*`` allowed: what is finished there under the same key is linked here
    instead of made again."""
    max_parallel_jobs: int | None = within(1, default=None)
    """Independent stages run side by side on this machine; ``None``: as many as its cores hold."""
    peak_tflops: float | None = within(1e-6, 1e6, default=None)
    """Peak of one GPU or rank in TFLOP/s, for MFU; ``None``: looked up (chips.py)."""
    hang_minutes: float = within(0, 100_000, default=60.0)
    """A training rank without a step for so long, its first included, hangs: all ranks print their
    stacks, the stage ends, and under Slurm it is requeued. 0: never."""

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
