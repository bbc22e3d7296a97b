"""The blocks of a recipe from text to a trained model: its shape, its tokenizer, the domains, and a
training stage with the layout of its ranks. Their rules are those of :mod:`.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_btx.recipe.fields import of_before, path, within

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The shape of the dense seed: RMSNorm, SwiGLU and rotary positions, as in Llama, and by the
    fields at the end as in its relatives (Llama 3, Mistral, Qwen, Granite, SmolLM3)."""

    num_layers: int = within(1, 10_000)
    """Transformer layers."""
    hidden_size: int = within(1, 10**6)
    """Width of a token's hidden state."""
    ffn_hidden_size: int = within(1, 10**7)
    """Hidden size of the feed-forward layer."""
    num_attention_heads: int = within(1, 10**5)
    """Query heads."""
    num_query_groups: int | None = within(1, 10**5, default=None)
    """Key/value heads (grouped-query attention); ``None``: as many as ``num_attention_heads``."""
    kv_channels: int | None = within(1, 10**5, default=None)
    """Head dimension; ``None``: ``hidden_size / num_attention_heads``."""
    seq_length: int = within(1, 10**9, default=4096)
    """Sequence length in training, in tokens."""
    rotary_base: float = within(1, default=10000.0)
    """Base of the rotary frequencies (`rope_theta`)."""
    layernorm_epsilon: float = within(1e-12, 0.01, default=1e-5)
    """Epsilon of RMSNorm."""
    untie_embeddings_and_output_weights: bool = True
    """Whether the output layer has its own weights; `false`: it uses the embedding."""
    init_method_std: float = within(0, 1, default=0.02)
    """Standard deviation of the normal distribution that weights are initialised from."""
    make_vocab_size_divisible_by: int = within(1, 10**6, default=128)
    """The vocabulary is padded to a multiple of this only, so that the shapes in a checkpoint do
    not depend on the layout. Tensor parallelism must divide the padded size."""
    max_position_embeddings: int | None = within(1, 10**9, default=None)
    """The longest sequence it was made for, written to its export; ``None``: ``seq_length``."""
    add_qkv_bias: bool = False
    """Biases on queries, keys and values (Qwen2)."""
    qk_layernorm: bool = False
    """RMSNorm over the queries and keys of each head (Qwen3)."""
    rope_scaling: bool = False
    """Llama 3's scaling of low rotary frequencies as Megatron computes it: from 8192 positions,
    low and high frequency factors 1 and 4."""
    rope_scaling_factor: float = within(1, default=8.0)
    """Its factor: 8 in Llama 3.1, 32 in Llama 3.2."""
    seq_len_interpolation_factor: float | None = within(1, default=None)
    """Positions are divided by this (linear scaling, arXiv 2306.15595)."""
    window_size: tuple[int, ...] | None = within(0, 10**9, default=None)
    """Sliding window: with ``[n, 0]`` a token attends to itself and the n tokens before it
    (Mistral's ``sliding_window`` is n + 1)."""
    window_attn_skip_freq: tuple[int, ...] | None = within(0, 1, default=None)
    """One entry per layer: 1 with the sliding window, 0 with full attention; ``None``: the window
    in all layers."""
    no_rope_freq: tuple[int, ...] | None = within(0, 1, default=None)
    """One entry per layer: 1 without rotary embedding, 0 with it (SmolLM3); ``None``: with it in
    all layers."""
    softmax_scale: float | None = within(1e-9, 1e3, default=None)
    """Factor of the attention scores (Granite's ``attention_multiplier``); ``None``: one over the
    square root of the head dimension."""
    embedding_multiplier: float = within(1e-6, 1e6, default=1.0)
    """Factor of the token embeddings (Granite)."""
    residual_multiplier: float = within(1e-6, 1e6, default=1.0)
    """Factor of the outputs of attention and feed-forward layer before the residual addition
    (Granite)."""
    logits_scaling: float = within(1e-6, 1e6, default=1.0)
    """Divisor of the logits (Granite)."""
    moe_ffn_hidden_size: int | None = within(1, 10**7, default=None)
    """FFN hidden size of an expert, in an imported MoE; ``None``: ``ffn_hidden_size``."""
    moe_shared_expert_intermediate_size: int | None = within(1, 10**7, default=None)
    """FFN hidden size of the shared expert of an imported MoE; ``None``: no shared expert."""
    moe_shared_expert_gate: bool = False
    """Whether a sigmoid gate scales the output of the shared expert (Qwen2-MoE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerBlock:
    """SentencePiece (trained by the recipe or given) or a Hugging Face tokenizer."""

    type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    """Kind of tokenizer."""
    path: str | None = path()
    """A ``.model`` file or a Hugging Face directory. ``None``: train SentencePiece on the seed's
    data, or use the tokenizer of ``seed.from``."""
    vocab_size: int = within(1, 10**8, default=32000)
    """Number of pieces to train; with ``path`` the size of that tokenizer counts."""
    train_bytes: int = within(1, default=20_000_000)
    """Maximum amount of text for training the tokenizer, in bytes, taken evenly from the seed's
    domains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One body of text: files, directories of them and prefixes of Megatron's ``.bin`` / ``.idx``
    pairs (docs/data.md), or a corpus every machine has."""

    train: tuple[str, ...] = path(())
    """Training text."""
    valid: tuple[str, ...] = path(())
    """Held-out text; if there is none, a part of the training text is held out."""
    weights: tuple[float, ...] = within(1e-9, 1e9, default=())
    """Sampling weight of each path of ``train`` (normalised); empty: in proportion to their
    tokens."""
    text_key: str = "text"
    """Name of the text field in JSON, of the column in Parquet and Arrow."""
    builtin: Literal["general", "code", "math", "prose"] | None = None
    """Use text that is found on this machine (megatron_btx/data/builtin/corpora.py) instead of
    files."""
    builtin_bytes: int = within(1, default=6_000_000)
    """Maximum amount of built-in training text, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a job's ranks divide a model, in Megatron's terms. World size = TP x PP x CP x DP."""

    tensor_model_parallel_size: int = within(1, 10**6, default=1)
    """TP: number of ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = within(1, 10**6, default=1)
    """PP: number of ranks that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = within(2, 10**6, default=None)
    """Virtual pipeline stages per rank (Megatron's interleaved schedule: less idle time, more
    communication); in training only. ``None``: one."""
    context_parallel_size: int = within(1, 10**6, default=1)
    """CP: must be 1."""
    data_parallel_size: int = within(1, 10**6, default=1)
    """DP: number of replicas of the model."""
    expert_model_parallel_size: int = within(1, 10**6, default=1)
    """EP: number of ranks that share the experts, in finetuning and evaluation (dense models of the
    same job have none)."""
    expert_tensor_parallel_size: int | None = within(1, 10**6, default=None)
    """Tensor parallel size of the experts; ``None``: ``tensor_model_parallel_size``, as in
    Megatron."""
    sequence_parallel: bool | None = None
    """``None``: on for an MoE with tensor parallelism (Megatron requires it there), else off."""
    num_threads: int = within(1, 10**6, default=1)
    """CPU threads per rank. Part of the recipe, because bit-for-bit resuming depends on it."""

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
    def chunks(self) -> int:
        """Pieces of the model on each rank, Megatron's model chunks."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def etp(self) -> int:
        """Expert tensor parallel size with its default resolved."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def dense(self) -> Layout:
        """The same ranks as a model without experts has them."""
        return replace(self, expert_model_parallel_size=1, expert_tensor_parallel_size=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronOptions:
    """Fields passed unchanged to Megatron's dataclasses; every key is checked against them."""

    transformer: dict[str, Any] = field(default_factory=dict)
    """``TransformerConfig`` (with ``ModelParallelConfig``): recompute_granularity, ..."""
    ddp: dict[str, Any] = field(default_factory=dict)
    """``DistributedDataParallelConfig``: overlap_grad_reduce, bucket_size, ..."""
    optimizer: dict[str, Any] = field(default_factory=dict)
    """``OptimizerConfig``: overlap_param_gather, log_num_zeros_in_grad, ..."""


def _as_freeze_experts(freeze: tuple[str, ...]) -> tuple[str, Any]:
    """``[experts]`` was ``freeze_experts: true`` once."""
    return ("freeze_experts", True) if freeze == ("experts",) else ("freeze", freeze)


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training stage. Optimiser settings default to the paper's (section 4.1): AdamW, weight
    decay 0.1, peak learning rate 1e-4, 100 warm-up steps, cosine decay to a tenth; betas, epsilon
    and clipping are Llama-2's (arXiv 2307.09288, section 2.2), which the paper refers to."""

    tokens: int = within(0, default=0)
    """Number of training tokens, rounded up to whole steps of ``global_batch_size *
    seq_length``."""
    data: dict[str, float] = field(default_factory=dict)
    """Domain -> sampling weight (normalised)."""
    global_batch_size: int = within(1, 10**9, default=1024)
    """Sequences per step over all ranks."""
    micro_batch_size: int = within(1, 10**6, default=1)
    """Sequences per rank and forward pass."""
    lr: float = within(1e-12, 10, default=1e-4)
    """Peak learning rate."""
    min_lr: float | None = within(0, 10, default=None)
    """Final learning rate; ``None``: a tenth of ``lr``."""
    lr_warmup_iters: int = within(0, default=100)
    """Number of steps of linear warm-up."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """Decay of the learning rate from its peak to `min_lr`. ``WSD`` (warm-up, stable, decay):
    constant until the last ``lr_wsd_decay_iters`` steps."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Decay in the last ``lr_wsd_decay_iters`` steps of ``WSD``."""
    lr_wsd_decay_iters: int | None = within(1, default=None)
    """Number of decay steps of ``WSD``; required for it."""
    weight_decay: float = within(0, 100, default=0.1)
    """Weight decay of AdamW."""
    adam_beta1: float = within(0, 0.999999, default=0.9)
    """Beta 1 of AdamW."""
    adam_beta2: float = within(0, 0.9999999, default=0.95)
    """Beta 2 of AdamW."""
    adam_eps: float = within(1e-20, 1, default=1e-5)
    """Epsilon of AdamW."""
    clip_grad: float = within(0, default=1.0)
    """Maximum norm of the gradient; 0: no clipping."""
    precision: Precision = "bf16"
    """Precision of parameters and matrix products; with ``bf16`` the optimizer keeps fp32
    copies."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    layout: Layout = Layout()
    """Layout of the stage's ranks."""
    save_interval: int = within(1, default=1000)
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = False
    """Write checkpoints while training continues, except the last one and that of a stopped run.
    Needs host memory for a second copy of what a rank saves."""
    keep_checkpoints: int = within(1, default=2)
    """Number of checkpoints kept for resuming; the last step's is always kept, for the next
    stages."""
    average_last: int = within(1, 1000, default=1)
    """The model of the stage is the mean of its last checkpoints, this many (all, if there are
    fewer): that of the last step, and the ``save_interval`` checkpoints before it. Replaces a
    decay of the learning rate (WSM, arXiv 2507.17634): use it with ``lr_decay_style: constant``."""
    eval_interval: int = within(0, default=1000)
    """Steps between held-out evaluations during training; 0: only before the first and after the
    last step."""
    eval_tokens: int = within(1, default=65_536)
    """Held-out tokens per domain in these evaluations, at most."""
    check_replicas_interval: int = within(0, default=100)
    """Steps between checks by hash that replicated parameters are equal on all ranks; 0: never."""
    anchor: Literal["seed"] | None = None
    """For experts: train an MoE of two experts, the seed's feed-forward layers, which stay frozen,
    and its own, initialised as a copy of them (FlexOlmo, arXiv 2507.07024; BAR, arXiv 2604.18473).
    ``freeze`` sets what else is frozen; the mix uses its own expert."""
    freeze: tuple[str, ...] = of_before((), _as_freeze_experts)
    """What is frozen: ``embeddings``, ``attention``, ``norms``, ``ffn`` (of a dense model),
    ``experts``, ``experts.NAME``, ``router``, ``head``, or a pattern of tensor names
    (``decoder.layers.0.*``). Frozen weights stay bit for bit the same and have no optimizer state.
    The paper's ablation (section 4.3.2) freezes ``[experts]``."""
    freeze_until: int | None = within(1, default=None)
    """Freeze only for this many tokens of the stage, rounded up to whole steps; ``None``: for the
    whole stage."""
    lr_groups: dict[str, float] = within(1e-12, 10, default_factory=dict)
    """Separate peak learning rates, by the words of ``freeze``; if several match a tensor, the
    last one counts. ``min_lr`` is scaled in proportion."""
    reset_attention_mask: bool = False
    """Megatron's: a token attends to its own document only, in held-out evaluations too. Must be
    the same in all stages, as the next two: set it under ``training`` (docs/data.md). Not with
    Transformer Engine."""
    eod_mask_loss: bool = False
    """Megatron's: the token after an end-of-document token has no loss, in held-out evaluations
    too; the loss is the mean over the remaining tokens of the global batch."""
    reset_position_ids: bool = False
    """Megatron's: position ids restart with each document. Only with ``reset_attention_mask``, and
    then without effect, because rotary embeddings depend on relative positions."""
    megatron: MegatronOptions = MegatronOptions()
    """Options of Megatron."""
    from_: str | None = path()
    """A checkpoint to use instead of training: a step directory of ours, of Megatron-LM or of
    Megatron-Bridge, or a Hugging Face directory. Written ``from:`` in the YAML."""
