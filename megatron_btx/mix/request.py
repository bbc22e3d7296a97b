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
    """the mix"""
    format: Literal["hf", "megatron"] = "hf"
    """format of the result"""
    family: str = ""
    """the Hugging Face family to write, by its model_type (default: the first that computes it)"""
    fused: bool = False
    """stack the experts' tensors, under the names of transformers 5 (hf; default: one by one)"""
    tokenizer: str = ""
    """the source whose tokenizer and chat template the result gets, even if others differ
    (default: the first that has one; all must be equal)"""
    align_vocab: bool = False
    """if tokenizers differ by added tokens only, extend all models to the largest vocabulary:
    missing rows are taken from the seed, or else from the first source that has them"""
    dtype: Literal["bf16", "fp32", "fp16"] | None = None
    """dtype of the result (default: that of the sources)"""
    average: tuple[str, ...] = ()
    """NAME=WEIGHT of every source in the average of all tensors outside the experts, or `tokens`:
    by the tokens that each was trained on since --seed-model (default: uniform)"""
    average_groups: tuple[str, ...] = ()
    """GROUP:NAME=WEIGHT, separate weights for embeddings, attention, norms or head"""
    dare: float | None = like(Mix, "dare")
    """share of the differences from the seed that DARE drops before averaging"""
    ties: float | None = like(Mix, "ties")
    """share of the differences from the seed that TIES keeps before averaging"""
    base: str = ""
    """the source from which everything but the experts is copied; not an expert itself (btx), as
    mergekit's base_model (default: all sources are experts and are averaged)"""
    seed_model: str = "seed"
    """the source from which the others were branched"""
    fold_norms: bool = False
    """fold the pre-FFN norm gain of each expert into its weights (btx)"""
    moe_router_topk: int = like(Routing, "moe_router_topk")
    """experts per token"""
    router_init: Literal["normal", "zeros", "uniform", "centroids", "ridge", "branches"] = "normal"
    """initialisation of the routers; branches: the rows learned by anchored branches"""
    centroids: str | None = None
    """a file written by `btx centroids`, for --router-init centroids or ridge"""
    router_init_std: float = like(Mix, "router_init_std")
    """standard deviation of normal, or half the interval of uniform"""
    random_seed: int = like(Recipe, "random_seed")
    """random seed of routers, noise, re-initialisation and DARE"""
    copies: int = like(Mix, "copies")
    """number of experts of an upcycled model"""
    num_chunks: int = like(Mix, "num_chunks")
    """number of pieces that each FFN is cut into (upcycle, split)"""
    scale: Literal["down", "cube_root", "none"] = "down"
    """correction of the scale of cut FFNs"""
    noise: float = like(Mix, "noise")
    """standard deviation of normal noise added to upcycled experts"""
    drop_ratio: float = like(Mix, "drop_ratio")
    """share of each upcycled expert's inner units that are re-initialised (Drop-Upcycling)"""
    expert: str = ""
    """the expert that drop removes, or that replace replaces by the second source (default:
    the expert of the same name)"""
    shard: str = "1GiB"
    """size of an output file; an interruption loses at most this"""
    memory: str = ""
    """peak resident memory, such as 2GiB (default: chosen for speed)"""
    workers: int = within(1, COUNT, default=2)
    """files written in parallel"""
    model: dict[str, Any] = field(default_factory=dict)
    """fields of Megatron sources that do not contain them, with Megatron's names; in a file only"""
    dry_run: bool = False
    """print the plan, write nothing"""
