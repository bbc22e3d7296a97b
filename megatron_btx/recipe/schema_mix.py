"""The blocks of a recipe for what the experts become: the mix, its routing, or an ensemble. Their
rules are those of :mod:`.schema`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_btx.recipe.fields import path, renamed, within


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """How dense models become one MoE (sections 3.2 and 3.3)."""

    method: Literal["btx", "split", "blend", "upcycle"] = "btx"
    """``btx``: the FFN of each model becomes an expert. ``split``: each FFN is cut into
    ``num_chunks`` experts. ``blend``: as many experts as models, each with a part of every model.
    ``upcycle``: copies of the seed only."""
    include_seed: bool = True
    """Add the seed as it is (the generalist) as the last expert (section 4.1.1)."""
    copies: int = within(1, 1000, default=8)
    """``upcycle``: number of experts; of virtual groups of experts if ``num_chunks`` is more than
    1."""
    num_chunks: int = within(1, 1000, default=1)
    """C, the number of experts that each FFN is cut into, each ``ffn_hidden_size / C`` wide: for
    ``split`` and for granular ``upcycle``."""
    scale: Literal["down", "cube_root", "none"] = "down"
    """Correction for gates that sum to one over the C chunks of an FFN: ``down`` multiplies the
    down matrices by C; ``cube_root`` is the rule of arXiv 2410.07524 (``upcycle`` only); ``none``:
    no correction (the paper mentions none)."""
    average: Literal["uniform", "tokens"] | dict[str, float] = "uniform"
    """Weights of the average of everything but the feed-forward layers: uniform as in the paper;
    by the tokens that each model was trained on since the seed (zero for the seed); or by model
    name (``seed`` and the domains), normalised."""
    average_groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Separate weights for ``embeddings``, ``attention``, ``norms`` or ``head``."""
    dare: float | None = within(0, 0.999, default=None)
    """Share of the differences from the seed that DARE drops before averaging; the rest is
    rescaled (arXiv 2311.03099)."""
    ties: float | None = within(1e-6, 1, default=None)
    """Share of the differences from the seed that TIES keeps in each tensor, those of largest
    magnitude, before it elects a sign per element and averages the differences with that sign
    (arXiv 2306.01708)."""
    fold_norms: bool = False
    """``btx``: multiply the gate and up matrices of each expert by the ratio of its own pre-FFN
    norm gain to the averaged gain."""
    noise: float = within(0, 100, default=0.0)
    """``upcycle``: standard deviation of normal noise added to the weights of every expert."""
    drop_ratio: float = within(0, 1, default=0.0)
    """``upcycle``: share of each expert's inner units that are re-initialised (Drop-Upcycling,
    arXiv 2502.19261)."""
    router_init: Literal["normal", "zeros", "uniform", "centroids", "ridge", "branches"] = "normal"
    """Initialisation of the routers; the paper does not state one. ``normal``: with standard
    deviation ``router_init_std``, whatever ``init_method_std`` is. ``centroids``: each expert's
    row is the mean hidden state of its domain, centred and scaled. ``ridge``: ridge regression of
    the domain on the hidden states (DUME, arXiv 2603.29765). ``branches``: the rows learned by
    anchored branches; the seed's row is their mean."""
    router_init_std: float = within(0, 100, default=0.02)
    """Standard deviation of ``normal``, half the width of the interval of ``uniform``."""
    centroids: str | None = path()
    """File written by ``btx centroids``, for ``router_init: centroids`` or ``ridge``; ``None``:
    computed from the run's training text when the finetuning starts."""
    router_init_tokens: int = within(1, default=65_536)
    """Number of tokens of each expert's domain for that computation."""
    align_vocab: bool = False
    """If the tokenizers of imported models (``from:``) differ by added tokens only, extend all
    models to the largest vocabulary and use its tokenizer for the run: missing rows are taken from
    the seed, or else from the first model that has them."""

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
class Routing:
    """The routing function g and its balance loss (sections 3.2, 3.3 and 4.3.1)."""

    type: Literal["topk", "switch", "sample_top1", "soft"] = "topk"
    """The routing function."""
    moe_router_topk: int = within(1, 10_000, default=2)
    """k of ``topk``; fixed by the other types (switch and sample_top1: 1; soft: all experts)."""
    moe_router_pre_softmax: bool = False
    """``topk``: softmax over all experts, of which the k largest are used unnormalised, so that
    gates do not sum to one (Qwen's MoEs). In the paper the softmax is over the k largest logits."""
    balance_loss_coeff: float = within(0, 1000, default=0.01)
    """alpha of the load balancing loss L_LB = alpha N sum_i u_i p_i (section 3.3), in every
    layer."""
    moe_expert_capacity_factor: float = within(0.01, default=1.5)
    """``switch`` only (section 3.3): tokens beyond an expert's capacity are dropped."""
    temperature_min: float = within(1e-6, default=0.5)
    """``sample_top1``: the lowest temperature."""
    temperature_rate: float = within(0, default=1e-4)
    """``sample_top1``: tau = max(temperature_min, exp(-temperature_rate * step))."""
    first_layer_soft: bool = True
    """``sample_top1``: soft routing in the first layer (section 3.3)."""
    greedy: bool = False
    """``sample_top1`` at inference: the expert with the largest logit instead of a seeded
    sample."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Megatron's load balancing loss, in addition to the paper's."""
    moe_aux_loss_coeff: float = within(0, 1000, default=0.0)
    """Coefficient of Megatron's load balancing loss."""
    moe_z_loss_coeff: float | None = within(0, 1000, default=None)
    """Coefficient of the router's z-loss; ``None``: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BTM:
    """Branch-Train-Merge (arXiv 2208.03306): the experts and the seed as an ensemble."""

    method: Literal["top1", "top2", "posterior", "average"] = renamed("top2", "select")
    """Which experts predict a text: ``top1`` or ``top2``, those nearest by tf-idf, as in the BTX
    paper (section 4.1.2); ``posterior``, all of them, weighted by the posterior of their domains,
    as in the BTM paper; ``average``, one model with averaged weights."""
