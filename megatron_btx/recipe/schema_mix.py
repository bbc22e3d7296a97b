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
    router_init: Literal["normal", "zeros", "uniform", "centroids", "ridge", "branches"] = "normal"
    """The paper does not give one; normal draws of ``router_init_std`` by default, whatever the
    model's ``init_method_std`` is. ``centroids``: each expert's row points to where its domain's
    hidden states are; ``ridge``: the rows solve the ridge regression of the domain on them (DUME,
    arXiv 2603.29765); ``branches``: the rows that anchored branches have learned, the seed's their
    mean."""
    router_init_std: float = within(0, 100, default=0.02)
    """Standard deviation, or half the width of the interval."""
    centroids: str | None = path()
    """The file of ``btx centroids``, for ``router_init: centroids`` or ``ridge``; ``None``: made of
    the run's own training text where the finetuning begins."""
    router_init_tokens: int = within(1, default=65_536)
    """Tokens of each expert's domain that they are then made of."""
    align_vocab: bool = False
    """Where the tokenizers of models that are taken (``from:``) differ by added tokens only, put
    all models to the largest vocabulary, whose tokenizer the run gets: rows that one lacks are the
    seed's, or those of the first model that has them."""

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
class BTM:
    """Branch-Train-Merge (arXiv 2208.03306): the experts and the seed as an ensemble."""

    method: Literal["top1", "top2", "posterior", "average"] = renamed("top2", "select")
    """The experts nearest to a text by tf-idf, as in the BTX paper (section 4.1.2); all of them by
    the posterior of their domains, as in BTM's own; or one model, the average of their weights."""
