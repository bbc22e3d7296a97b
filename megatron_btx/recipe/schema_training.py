"""The blocks of a recipe from text to a trained model: its shape, its tokenizer, the domains, and a
training stage with the layout of its ranks. Their rules are those of :mod:`.schema`."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    no_rope_freq: tuple[int, ...] | None = within(0, 1, default=None)
    """1 for every layer without rotary positions, 0 for one with them (SmolLM3); ``None``: all with
    them."""
    softmax_scale: float | None = within(1e-9, 1e3, default=None)
    """What multiplies the scores of attention (Granite's ``attention_multiplier``); ``None``: one
    over the root of a head's width."""
    embedding_multiplier: float = within(1e-6, 1e6, default=1.0)
    """What multiplies a token's embedding on its way into the first layer (Granite)."""
    residual_multiplier: float = within(1e-6, 1e6, default=1.0)
    """What multiplies the output of attention and of the feed-forward layer before it is added
    (Granite)."""
    logits_scaling: float = within(1e-6, 1e6, default=1.0)
    """What divides the logits (Granite)."""
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
    virtual_pipeline_model_parallel_size: int | None = within(2, 10**6, default=None)
    """Virtual pipeline stages a rank, each a piece of the layers (Megatron's interleaved schedule:
    less waiting, more sends); of training only. ``None``: its layers are one piece."""
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
    def chunks(self) -> int:
        """Pieces of the model on each rank, Megatron's model chunks."""
        return self.virtual_pipeline_model_parallel_size or 1

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


def _as_freeze_experts(freeze: tuple[str, ...]) -> tuple[str, Any]:
    """``[experts]`` was ``freeze_experts: true`` once."""
    return ("freeze_experts", True) if freeze == ("experts",) else ("freeze", freeze)


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
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """How the learning rate falls from its peak to `min_lr`. ``WSD`` (warm-up, stable, decay): it
    stays at the peak until the last ``lr_wsd_decay_iters`` steps."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How it falls in those."""
    lr_wsd_decay_iters: int | None = within(1, default=None)
    """Steps of WSD's decay; must be given with it."""
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
    async_save: bool = False
    """Go on training while a checkpoint is written; the last one, and that of a stopped run, are
    waited for. Takes the host's memory for a second copy of what a rank saves."""
    keep_checkpoints: int = within(1, default=2)
    """Whole checkpoints kept for resuming; the final one is kept for the stages that follow."""
    average_last: int = within(1, 1000, default=1)
    """The stage's model is the mean of its last so many checkpoints (of all if there are fewer):
    the last step's, and those of ``save_interval`` before it. In place of a decay of the learning
    rate (WSM, arXiv 2507.17634): with ``lr_decay_style: constant``."""
    eval_interval: int = within(0, default=1000)
    """Steps between held-out evaluations during training; 0: only at the end."""
    eval_tokens: int = within(1, default=65_536)
    """Held-out tokens a domain for those, at most."""
    check_replicas_interval: int = within(0, default=100)
    """Steps between hashes of replicated parameters across ranks; 0: never."""
    anchor: Literal["seed"] | None = None
    """An expert's only: it is trained as an MoE of two experts, the seed's feed-forward layers,
    which stay as they are, and its own, which begin as a copy of them (FlexOlmo, arXiv 2507.07024;
    BAR, arXiv 2604.18473). ``freeze`` says what else stays; the mix takes its own expert."""
    freeze: tuple[str, ...] = of_before((), _as_freeze_experts)
    """What does not learn: ``embeddings``, ``attention``, ``norms``, ``ffn`` (of a dense model),
    ``experts``, ``experts.NAME``, ``router``, ``head``, or a pattern of tensor names
    (``decoder.layers.0.*``). It stays as it is, to the bit, and has no optimizer state. The paper's
    ablation (section 4.3.2) freezes ``[experts]``."""
    freeze_until: int | None = within(1, default=None)
    """For so many tokens of the stage, rounded up to whole steps, after which all learns; ``None``:
    throughout."""
    lr_groups: dict[str, float] = within(1e-12, 10, default_factory=dict)
    """Peak learning rates of their own, by the words of ``freeze``; of several that name a tensor
    the last counts. ``min_lr`` is in proportion."""
    reset_attention_mask: bool = False
    """Megatron's: a token sees its own document only, in held-out evaluations too. The same in all
    stages, as the next: set it under ``training`` (docs/data.md). Not with Transformer Engine."""
    eod_mask_loss: bool = False
    """Megatron's: what follows an end token is not predicted, nor counted in held-out losses; the
    loss is the mean over the predicted tokens of the global batch."""
    reset_position_ids: bool = False
    """Megatron's: positions begin anew with each document. Only with ``reset_attention_mask``,
    beside which it changes nothing: rotary positions count by their differences."""
    megatron: MegatronOptions = MegatronOptions()
    """Options of Megatron's own."""
    from_: str | None = path()
    """A checkpoint to take instead of training: a step directory of ours, of Megatron-LM or of
    Megatron-Bridge, or a Hugging Face directory. Written ``from:`` in the YAML."""
