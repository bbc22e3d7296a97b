"""Bytes: what a rank holds while it trains, and what a checkpoint takes on disk.

Two totals: what is *allocated*, which is what a GPU reports, and what is *resident* on a CPU, where
the runtime and what the C library and oneDNN do not give back come on top. The formulae follow the
modules of megatron_btx/engine (``scaled_dot_product_attention``, grouped experts, gradients
accumulated in fp32) and were read off the tensors that autograd keeps.
"""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

from megatron_btx import cpu_info
from megatron_btx.recipe import count
from megatron_btx.recipe.architecture import Architecture
from megatron_btx.recipe.check_layout import sequence_parallel
from megatron_btx.recipe.schema import Layout, Training

RUNTIME = {"cpu": 350_000_000, "cuda": 695_000_000}
"""Resident size of a CPU rank that has imported torch and Megatron-Core and joined its process
groups, before it builds a model, by what its torch was built for. A GPU's context is outside of
what its allocator reports."""

HELD = {"dense": 25_000_000, "moe": 55_000_000}
"""What a CPU rank holds on top: small things, and for an MoE the machine code that oneDNN writes
for each number of an expert's tokens. Where oneDNN does not multiply (bf16 without AVX-512; fp32
where MKL does), a dense model's holds."""

KEPT = {"dense": 0.7, "moe": 1.6}
"""Blocks that glibc keeps (engine/cpu_tuning.py) and cannot use again for others, as a share of
what the activations are in fp32, or in bf16 where oneDNN does not multiply that. Measured, as
``HELD`` is, at hidden 48, 64 and 512, with tied and untied embeddings, in fp32 and bf16, on one and
two ranks: 32 runs, the plan within 0.94 and 1.07 of each peak (without AVX-512, five runs: within
1.10)."""

EXCHANGED = 1.65
"""So many times more where ranks exchange activations (tensor or expert parallelism)."""

_ELEMENT = {"fp32": 4, "bf16": 2}
_ITEM = 2400
"""Bytes that one tensor shard costs in a ``torch_dist`` directory beside its data: the header of
its zip container and its entry in ``.metadata``."""
_OBJECT = 1600
"""The same of an object that is no tensor, an ``_extra_state``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peak bytes of one rank, the one that needs most."""

    weights: int
    gradients: int
    """Megatron's buffer, fp32 whatever the precision."""
    optimizer: int
    """Both moments and, for bf16, the master weights: fp32."""
    activations: int
    """What the layers keep for the backward pass, of all micro-batches in flight."""
    transient: int
    """The most that comes on top: the loss's softmax, the logits' gradient and the output layer's,
    or later the layers that are recomputed."""
    held: int
    """On a CPU, see ``HELD``, ``KEPT`` and ``keeps_probabilities``; with the distributed optimizer
    also its collectives' fp32 copy."""

    saving: int = 0
    """Host memory that an asynchronous save takes meanwhile: a second copy of what the rank saves,
    of a GPU's state the copy on the host; on a CPU of what training changes as it is written."""

    @property
    def allocated(self) -> int:
        """On a GPU: the peak of ``torch.cuda.max_memory_allocated``."""
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.transient

    @property
    def resident(self) -> int:
        """On a CPU: the process's peak resident set."""
        return self.allocated + runtime() + self.held + self.saving


@functools.cache
def runtime() -> int:
    """``RUNTIME`` of the torch that is installed here, which is not imported."""
    try:
        built = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        built = "+cpu"
    return RUNTIME["cpu" if "+cpu" in built else "cuda"]


def rank_parameters(architecture: Architecture, layout: Layout, stage: int) -> tuple[int, int]:
    """Parameters on a rank of one pipeline stage: (all but the experts, the experts)."""
    model, experts = architecture.model, len(architecture.experts)
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    h, width = model.hidden_size, count.expert_width(model) if experts else None
    ffn = count.ffn_parameters(model, width)
    shared, gate = count.shared_expert_parameters(architecture)
    layer = count.attention_parameters(model) // tp + 2 * h + experts * h
    layer += count.head_norm_parameters(model) + shared // tp + gate
    layer += count.qkv_width(model) // tp * model.add_qkv_bias
    expert_layer = experts // layout.expert_model_parallel_size * ffn // layout.etp
    if not experts:
        layer += ffn // tp
    matrix = architecture.padded_vocab_size * h // tp
    dense = layer * model.num_layers // pp
    is_first, is_last = stage == 0, stage == pp - 1
    if is_first:
        dense += matrix
    if is_last:
        dense += h
    if is_last and (model.untie_embeddings_and_output_weights or not is_first):
        dense += matrix
    return dense, expert_layer * model.num_layers // pp


def layer_activations(architecture: Architecture, training: Training) -> tuple[int, int]:
    """Bytes that one layer keeps for the backward pass of one micro-batch: (attention, FFN).

    With T tokens, N heads of d channels, elements of e bytes: attention keeps its input, its
    normalised input, q, k, v and the output in two layouts, 2 T H + 5 T N d; a dense FFN its input
    and normalised input, [gate; up] and the input of the second matrix, 2 T H + 3 T F; an MoE 2 T H
    and, for k T tokens sent to experts, k T (2 H + 2 F), the activation being computed again
    (engine/moe/experts.py); a shared expert is a dense FFN beside them that keeps its output too
    where a gate scales it. Norms of heads keep the mixed projection as well and the queries cut
    from it, T (2 N + 2 G) d. Tensor parallelism divides N d and F, sequence parallelism T H as
    well. Balanced experts are assumed.
    """
    model, layout = architecture.model, training.layout
    tp, element = layout.tensor_model_parallel_size, _ELEMENT[training.precision]
    is_moe = architecture.routing is not None
    tokens = _tokens(architecture, training)
    split = tp if sequence_parallel(layout, moe=is_moe) else 1
    rows = tokens * model.hidden_size // split
    heads = tokens * model.num_attention_heads * count.kv_channels(model) // tp
    attention = 2 * rows + 5 * heads
    if model.qk_layernorm:
        attention += heads + tokens * count.qkv_width(model) // tp
    if is_moe:
        runs = sum(count.experts_run(architecture)) / model.num_layers * tokens / split * layout.etp
        inner = count.expert_width(model) / layout.etp
        ffn = 2 * rows + int(runs * 2 * (model.hidden_size + inner))
        if shared := model.moe_shared_expert_intermediate_size:
            ffn += 3 * tokens * shared // tp + rows * model.moe_shared_expert_gate
    else:
        ffn = 2 * rows + 3 * tokens * model.ffn_hidden_size // tp
    return attention * element, ffn * element


def keeps_probabilities(seq_length: int, width: int) -> bool:
    """Whether attention on a CPU (engine/ops/cpu_attention.py) keeps its softmax for the backward
    pass: where the half of it that is not zero weighs no more than queries, keys, values and
    output, whose heads have that ``width``; and of 256 tokens at most, where it is 200 kB a
    head."""
    return seq_length <= max(256, 8 * width)


def query_rows(seq_length: int) -> int:
    """How many queries attention on a CPU works through at a time. Fewer leave out more of the
    scores that are masked anyway, but below 128 the products are too small to be efficient."""
    return min(seq_length, max(128, seq_length // 8))


def _gates(architecture: Architecture, training: Training) -> int:
    """Bytes of the softmax that one layer keeps, fp32: a block of queries holds the scores of all
    tokens up to its last, masked ones too."""
    model, options = architecture.model, training.megatron.transformer
    seq, granularity = model.seq_length, options.get("recompute_granularity")
    modules = options.get("recompute_modules") or ["core_attn"]
    recomputed = granularity == "full" or (granularity == "selective" and "core_attn" in modules)
    if recomputed or not keeps_probabilities(seq, count.kv_channels(model)):
        return 0
    heads = model.num_attention_heads // training.layout.tensor_model_parallel_size
    return 4 * heads * training.micro_batch_size * seq * (seq + query_rows(seq)) // 2


def training_memory(architecture: Architecture, training: Training) -> Memory:
    """Peak memory of the pipeline stage that needs most, under the stage's own layout."""
    stages = range(training.layout.pipeline_model_parallel_size)
    return max(
        (stage_memory(architecture, training, i) for i in stages),
        key=lambda memory: memory.allocated,
    )


def stage_memory(architecture: Architecture, training: Training, stage: int) -> Memory:
    """Peak memory of a rank of one pipeline stage."""
    model, layout = architecture.model, training.layout
    tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    element = _ELEMENT[training.precision]
    dense, experts = rank_parameters(architecture, layout, stage)
    state = 8 if training.precision == "fp32" else 12
    optimizer = state * (dense + experts)
    distributed = training.use_distributed_optimizer
    if distributed:
        dense_ranks = layout.data_parallel_size * layout.context_parallel_size
        expert_ranks = layout.world_size // (layout.etp * layout.expert_model_parallel_size * pp)
        optimizer = state * (-(-dense // dense_ranks) - (-experts // max(1, expert_ranks)))
    tokens = _tokens(architecture, training)
    rows = tokens * model.hidden_size * element
    micro_batches = training.global_batch_size // (
        training.micro_batch_size * layout.data_parallel_size
    )
    passes = in_flight(layout, stage, micro_batches)
    kept, transient = _layers(architecture, training)
    embedded = -(-passes // layout.chunks) if stage == 0 else 0
    activations = passes * kept + embedded * rows
    if stage == pp - 1:
        vocabulary = architecture.padded_vocab_size // tp
        activations += 2 * rows
        softmax = 4 * tokens * vocabulary  # fp32 whatever the precision
        loss = softmax + element * (tokens + model.hidden_size) * vocabulary
        transient = max(transient, loss)
    weights = element * (dense + experts)
    return Memory(
        weights=weights,
        gradients=4 * (dense + experts),
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        held=_held(architecture, training, activations)
        + passes * (model.num_layers // pp // layout.chunks) * _gates(architecture, training)
        + distributed * 4 * (dense + experts),
        saving=weights + optimizer if training.async_save else 0,
    )


def in_flight(layout: Layout, stage: int, micro_batches: int) -> int:
    """Passes through a piece of the model whose activations a rank of pipeline stage ``stage``
    holds at once: those that Megatron's schedule runs before the first backward pass
    (``get_pp_rank_microbatches``), and one. A piece is all layers of a rank, or of a virtual stage.
    """
    pp = layout.pipeline_model_parallel_size
    ahead = pp - stage - 1
    if layout.chunks > 1:
        ahead = 2 * ahead + (layout.chunks - 1) * pp
    return min(ahead + 1, layout.chunks * max(1, micro_batches))


def _held(architecture: Architecture, training: Training, activations: int) -> int:
    layout = training.layout
    ranks = layout.tensor_model_parallel_size * layout.expert_model_parallel_size
    kind = "moe" if architecture.routing else "dense"
    in_bf16 = training.precision == "bf16"
    onednn = cpu_info.has_avx512() if in_bf16 else cpu_info.has_avx512_without_mkl()
    # Only oneDNN has blocks in fp32 of what is in bf16.
    blocks = 2 * activations if in_bf16 and onednn else activations
    kept = KEPT[kind] * (EXCHANGED if ranks > 1 else 1) * blocks
    return HELD[kind if onednn else "dense"] + int(kept)


def _layers(architecture: Architecture, training: Training) -> tuple[int, int]:
    """(kept by all layers of a pipeline stage, or of a virtual one, for one micro-batch; brought
    back by recomputation at any one time)."""
    options, layout = training.megatron.transformer, training.layout
    layers = architecture.model.num_layers // layout.pipeline_model_parallel_size // layout.chunks
    attention, ffn = layer_activations(architecture, training)
    whole = attention + ffn
    is_moe = architecture.routing is not None
    split = layout.tensor_model_parallel_size if sequence_parallel(layout, moe=is_moe) else 1
    rows = _tokens(architecture, training) * architecture.model.hidden_size // split
    rows *= _ELEMENT[training.precision]
    granularity = options.get("recompute_granularity")
    if granularity == "full":
        chunk = min(layers, options.get("recompute_num_layers") or 1)
        if options.get("recompute_method") == "block":  # only the first `chunk` layers
            return chunk * rows + (layers - chunk) * whole, whole
        return -(-layers // chunk) * rows, chunk * whole
    if granularity == "selective" and {"mlp", "moe"} & set(options.get("recompute_modules") or ()):
        return layers * (attention + 2 * rows), ffn
    return layers * whole, 0


def _tokens(architecture: Architecture, training: Training) -> int:
    """Tokens of a micro-batch on one rank."""
    seq = architecture.model.seq_length // training.layout.context_parallel_size
    return seq * training.micro_batch_size


def checkpoint_bytes(
    architecture: Architecture, training: Training, *, has_optimizer: bool = True
) -> int:
    """Disk of one ``torch_dist`` checkpoint: the model in its precision; with the optimizer, both
    moments in fp32 and the fp32 weights where bf16 or the distributed optimizer has them apart."""
    masters = training.precision == "bf16" or training.use_distributed_optimizer
    states = (3 if masters else 2) if has_optimizer else 0
    parameters = count.parameters(architecture).total
    shards = _shards(architecture, training.layout) * (1 + states)
    if architecture.experts:  # a layer's norm has two names (weights/megatron.py)
        shards += architecture.model.num_layers
    elements = parameters * (_ELEMENT[training.precision] + 4 * states)
    return elements + _ITEM * shards + _OBJECT * _objects(architecture)


def _objects(architecture: Architecture) -> int:
    """Objects of a checkpoint, as many as ``weights/megatron.extra_states`` names."""
    model = architecture.model
    layer = 3 + 2 * model.qk_layernorm + 2 * len(architecture.experts)
    layer += 1 if architecture.experts else 2
    if architecture.experts and model.moe_shared_expert_intermediate_size is not None:
        layer += 2
    return model.num_layers * layer + 1


def _shards(architecture: Architecture, layout: Layout) -> int:
    """Shards of all parameters over all ranks, replicas once."""
    tp, ep, etp = (
        layout.tensor_model_parallel_size,
        layout.expert_model_parallel_size,
        layout.etp,
    )
    model = architecture.model
    # norms, also of queries and keys; qkv (with its bias) and projection
    whole, split = 2 + 2 * model.qk_layernorm, (2 + model.add_qkv_bias) * tp
    if architecture.routing is None:
        split += 3 * tp  # fc1 is stored as its two halves
    else:
        whole, split = whole + 1, split + 3 * ep * etp
        if model.moe_shared_expert_intermediate_size:
            whole, split = whole + model.moe_shared_expert_gate, split + 3 * tp
    matrices = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * (whole + split) + matrices * tp + 1
