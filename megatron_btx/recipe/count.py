"""What a recipe costs, as pure arithmetic: parameters, FLOPs, steps and tokens.

Conventions, the same everywhere in the project:

- A parameter count includes the padded vocabulary, the norms and the routers: it equals the sum of
  ``numel`` over the built Megatron model. ``total_true_vocab`` leaves the padding out.
- *Active* parameters are those that one token meets: all that is no expert, and the experts its
  router picks. The embedding counts (as in the paper's 6.7B / 11.1B / 19.7B, Table 4).
- FLOPs are *model* FLOPs: two per multiply-add of every matrix product that the forward pass needs,
  three times that for a training step. Recomputation, the embedding's lookup, norms, biases,
  softmaxes and rotary positions are left out. The output layer counts, with the padded vocabulary.
  Attention counts the full S x S products although half is masked: 12 L (heads d) S a token for
  training (PaLM, arXiv 2204.02311, appendix B); under a sliding window of W tokens S x W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.schema import Model, Recipe, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of one model by what they are, over all layers."""

    embedding: int
    output: int
    """The output layer; 0 where it is tied to the embedding."""
    attention: int
    """Its matrices."""
    norms: int
    """Norms and biases: what is no matrix."""
    ffn: int
    """All feed-forward weights: every expert's, and a shared expert's."""
    ffn_active: int
    router: int
    """Routers, and the gates of shared experts."""
    vocab_padding: int
    """How many of ``embedding`` and ``output`` belong to no token."""

    @property
    def total(self) -> int:
        """As built, padding included."""
        return self.embedding + self.output + self.attention + self.norms + self.ffn + self.router

    @property
    def active(self) -> int:
        """Those one token meets."""
        return self.total - self.ffn + self.ffn_active

    @property
    def total_true_vocab(self) -> int:
        """Without the padding of the vocabulary."""
        return self.total - self.vocab_padding


def kv_channels(model: Model) -> int:
    """Width of a head, d."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def query_groups(model: Model) -> int:
    """Key/value heads, g."""
    return model.num_query_groups or model.num_attention_heads


def resolved(model: Model) -> Model:
    """The model with every default filled in that follows from other fields, and nothing that says
    the same as its default."""
    return replace(
        model,
        num_query_groups=query_groups(model),
        kv_channels=kv_channels(model),
        softmax_scale=model.softmax_scale or kv_channels(model) ** -0.5,
        no_rope_freq=model.no_rope_freq if any(model.no_rope_freq or ()) else None,
    )


def experts_run(architecture: Architecture) -> tuple[int, ...]:
    """Experts (feed-forward layers) a token runs through in each layer.

    ``sample_top1`` runs all of them in the first layer where that one routes softly (section 3.3);
    the paper's 6.7B for it leaves that out.
    """
    layers, routing = architecture.model.num_layers, architecture.routing
    each = experts_per_token(architecture)
    soft = routing is not None and routing.type == "sample_top1" and routing.first_layer_soft
    return (len(architecture.experts) if soft else each, *[each] * (layers - 1))


def experts_per_token(architecture: Architecture) -> int:
    """Experts one token is sent to in an ordinary layer."""
    routing = architecture.routing
    if routing is None or routing.type in ("switch", "sample_top1"):
        return 1
    return routing.moe_router_topk if routing.type == "topk" else len(architecture.experts)


def expert_width(model: Model) -> int:
    """Inner width of one expert, F."""
    return model.moe_ffn_hidden_size or model.ffn_hidden_size


def windows(model: Model) -> tuple[int | None, ...]:
    """How many tokens a token sees in each layer, itself among them; ``None``: all before it."""
    if model.window_size is None:
        return (None,) * model.num_layers
    seen = model.window_size[0] + 1
    freq = model.window_attn_skip_freq or (1,) * model.num_layers
    return tuple(seen if windowed else None for windowed in freq)


def qkv_width(model: Model) -> int:
    """Rows of the fused attention input: (heads + 2 g) d."""
    return (model.num_attention_heads + 2 * query_groups(model)) * kv_channels(model)


def attention_parameters(model: Model) -> int:
    """Of one layer's matrices: qkv [(heads + 2 g) d, H] and the projection [H, heads d]."""
    projected = model.num_attention_heads * kv_channels(model)
    return model.hidden_size * (qkv_width(model) + projected)


def head_norm_parameters(model: Model) -> int:
    """Of one layer's norms over queries and keys: d each, where it has them."""
    return 2 * kv_channels(model) * model.qk_layernorm


def ffn_parameters(model: Model, width: int | None = None) -> int:
    """Of one feed-forward layer (or of one expert, whose width is given): gate and up [2F, H], down
    [H, F]."""
    return 3 * model.hidden_size * (width or model.ffn_hidden_size)


def shared_expert_parameters(architecture: Architecture) -> tuple[int, int]:
    """Of one layer of an MoE: (its shared expert, that one's gate); (0, 0) where it has none."""
    model = architecture.model
    width = model.moe_shared_expert_intermediate_size
    if width is None or architecture.routing is None:
        return 0, 0
    return ffn_parameters(model, width), model.hidden_size * model.moe_shared_expert_gate


def parameters(architecture: Architecture) -> Parameters:
    """Parameters of a dense model or of a mixture, by kind."""
    model, experts = architecture.model, len(architecture.experts)
    h, layers = model.hidden_size, model.num_layers
    padded = architecture.padded_vocab_size
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    ffn = ffn_parameters(model, expert_width(model) if experts else None)
    shared, gate = shared_expert_parameters(architecture)
    in_layer = 2 * h + head_norm_parameters(model) + qkv_width(model) * model.add_qkv_bias
    return Parameters(
        embedding=padded * h,
        output=padded * h * (matrices - 1),
        attention=layers * attention_parameters(model),
        norms=layers * in_layer + h,
        ffn=layers * (ffn * (experts or 1) + shared),
        ffn_active=ffn * sum(experts_run(architecture)) + layers * shared,
        router=layers * (experts * h + gate),
        vocab_padding=(padded - architecture.vocab_size) * h * matrices,
    )


def forward_flops_per_token(architecture: Architecture) -> int:
    """FLOPs of the forward pass for one token of a full sequence; also those of inference.

    ``2 (attention + active ffn + router + V_padded H) + 4 L (heads d) S``: the scores QK^T and the
    weighted sum of V are each ``2 (heads d) S`` a token and layer, or W for S where a window is.
    """
    model, counted = architecture.model, parameters(architecture)
    head = architecture.padded_vocab_size * model.hidden_size  # also where it is tied
    matrices = counted.attention + counted.ffn_active + counted.router + head
    width = model.num_attention_heads * kv_channels(model)
    seen = sum(min(model.seq_length, seen or model.seq_length) for seen in windows(model))
    return 2 * matrices + 4 * width * seen


def training_flops_per_token(architecture: Architecture) -> int:
    """Forward and backward: the backward pass has two products for each of the forward's, one for
    the gradient of the input and one for that of the weight. Where something is frozen:
    ``freezing.py``."""
    return 3 * forward_flops_per_token(architecture)


def steps(training: Training, model: Model) -> int:
    """Optimizer steps of a stage: its tokens rounded up to whole global batches."""
    return math.ceil(training.tokens / (training.global_batch_size * model.seq_length))


def trained_tokens(training: Training, model: Model) -> int:
    """The tokens of those steps."""
    return steps(training, model) * training.global_batch_size * model.seq_length


def averaged_steps(training: Training, model: Model) -> tuple[int, ...]:
    """The steps whose checkpoints a stage's model is the mean of: the last one, and multiples of
    ``save_interval`` before it; fewer than ``average_last`` where the stage is too short."""
    last = steps(training, model)
    before = range(
        (last - 1) // training.save_interval * training.save_interval, 0, -training.save_interval
    )
    return tuple(sorted([*before[: training.average_last - 1], last]))


def mixture(data: dict[str, float]) -> dict[str, float]:
    """Sampling weights that sum to one; domains of weight zero are left out."""
    total = math.fsum(data.values())
    return {name: weight / total for name, weight in data.items() if weight > 0}


def dense_architecture(recipe: Recipe) -> Architecture:
    """The seed's, with the vocabulary that the recipe states."""
    return Architecture(model=recipe.model, vocab_size=recipe.tokenizer.vocab_size)
