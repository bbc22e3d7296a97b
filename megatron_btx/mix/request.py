"""What ``btx mix`` is asked for. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_btx.recipe.fields import COUNT, like, within
from megatron_btx.recipe.schema import Mix, Recipe, Routing

MixMethod = Literal[
    "btx", "upcycle", "split", "blend", "average", "append", "drop", "replace", "copy"
]


@dataclass(frozen=True, kw_only=True)
class MixRequest:
    """What to mix and how. Every field is a flag, and a key of ``--config``."""

    sources: tuple[str, ...] = ()
    """NAME=DIR or DIR, in the order of the experts"""
    out: str = ""
    """the new directory"""
    method: MixMethod = "btx"
    """which mix"""
    format: Literal["hf", "megatron"] = "hf"
    """what the result is written as"""
    family: str = ""
    """the Hugging Face family to write, by its model_type (default: the first that computes it)"""
    fused: bool = False
    """stack the experts' tensors as transformers 5 names them (hf; default: one by one)"""
    tokenizer: str = ""
    """the source whose tokenizer and chat template the result gets, though those of others differ
    (default: the first that has one; all must be the same)"""
    align_vocab: bool = False
    """where tokenizers differ by added tokens only, put all models to the largest vocabulary: rows
    that one lacks are the seed's, or those of the first source that has them"""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """of the result; without it, that of the sources"""
    average: tuple[str, ...] = ()
    """NAME=WEIGHT of every source in the average of what is no expert, or `tokens`: as many as each
    was trained on since --seed-model (default: uniform)"""
    average_groups: tuple[str, ...] = ()
    """GROUP:NAME=WEIGHT, other weights for embeddings, attention, norms or head"""
    dare: float | None = like(Mix, "dare")
    """share of the differences from the seed that DARE drops from what is averaged"""
    ties: float | None = like(Mix, "ties")
    """share of the differences from the seed that TIES keeps of what is averaged"""
    base: str = ""
    """the source that all but the experts is copied from, and that is no expert itself (btx), as
    mergekit's base_model (default: all sources are experts and are averaged)"""
    seed_model: str = "seed"
    """the source from which the others were branched"""
    fold_norms: bool = False
    """fold each expert's own pre-FFN norm gain into it (btx)"""
    moe_router_topk: int = like(Routing, "moe_router_topk")
    """experts a token"""
    router_init: Literal["normal", "zeros", "uniform", "centroids", "ridge", "branches"] = "normal"
    """how routers are initialised; branches: as the sources, anchored branches, have learned"""
    centroids: str | None = None
    """the file of `btx centroids`, for --router-init centroids or ridge"""
    router_init_std: float = like(Mix, "router_init_std")
    """their standard deviation, or half their interval"""
    random_seed: int = like(Recipe, "random_seed")
    """of routers, noise, re-initialisation and DARE"""
    copies: int = like(Mix, "copies")
    """experts of an upcycled model"""
    num_chunks: int = like(Mix, "num_chunks")
    """pieces that each FFN is cut into (upcycle, split)"""
    scale: Literal["down", "cube_root", "none"] = "down"
    """what makes up for the cutting"""
    noise: float = like(Mix, "noise")
    """standard deviation of what is added to upcycled experts"""
    drop_ratio: float = like(Mix, "drop_ratio")
    """share of each upcycled expert's inner units that are drawn anew (Drop-Upcycling)"""
    expert: str = ""
    """the expert that drop takes out, or in whose place replace puts the second source (default:
    the one of its name)"""
    shard: str = "1GiB"
    """size of a file of the result: what an interruption loses at most"""
    memory: str = ""
    """peak resident memory, such as 2GiB (default: what is fastest)"""
    workers: int = within(1, COUNT, default=2)
    """files written side by side"""
    model: dict[str, Any] = field(default_factory=dict)
    """what Megatron sources are that do not say so, in Megatron's words; in a file only"""
    dry_run: bool = False
    """print the plan, write nothing"""
