"""``mergekit-moe``'s configuration files, as ``btx mix --config`` reads them.

What we average they copy from ``base_model``, which is an expert only where it is listed as one; a
router's row is the direction of an expert's prompts in the base model. What their words ask for
beyond that is refused, with the reason. Imports no torch until rows are made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from megatron_btx.errors import UserError, UserErrors, shown
from megatron_btx.files import check_file, written
from megatron_btx.recipe.messages import near_key
from megatron_btx.recipe.yaml_tree import Node, tree_of

BASE = "base"
"""Label of the base model among a mix's sources."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_OF_PROMPTS = ("hidden", "cheap_embed")
_MODES = (*_OF_PROMPTS, "random", "uniform_random")
_KEYS = ("base_model", "experts", "gate_mode", "dtype", "experts_per_token")
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts")
_REFUSED = {
    "shared_experts": "a Mixtral has none, and the mix of Branch-Train-MiX makes none",
    "architecture": "the output family is chosen automatically; --family chooses another",
}
_MERGES = (
    "average the models by flags: btx mix --method average --sources NAME=DIR ... [--average "
    "NAME=WEIGHT ...] [--ties SHARE | --dare SHARE] (docs/coming-from-mergekit.md)"
)
_EXPERT_REFUSED = {
    "noise_scale": (0, "no noise is added to experts that differ already"),
    "residual_scale": (1, "down projections are not scaled"),
}
"""What is not done to an expert: the value that asks for nothing, and why."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """How the routers' rows come about."""

    mode: str
    """``hidden``, ``cheap_embed`` or, without prompts, ``uniform_random``."""
    positive: tuple[tuple[str, ...], ...]
    """Of each expert."""
    negative: tuple[tuple[str, ...], ...]


def is_mergekit(tree: Node) -> bool:
    """Whether a file is one of theirs, by its keys."""
    return "base_model" in tree.value or "merge_method" in tree.value


def read(tree: Node) -> tuple[Node, Gates | None]:
    """What a file asks for, in the words of ``btx mix``, and how its routers begin; ``None``: as
    those words say.

    Raises:
        UserErrors: everything in it that is wrong, or that cannot be meant here.
    """
    if "merge_method" in tree.value:
        method = tree.value["merge_method"]
        what = f"{method.value!r:.40}: a file of mergekit-yaml, which makes no MoE"
        ours = str(method.value).startswith(("linear", "ties", "dare"))
        fix = _MERGES if ours else "merge with mergekit, and give its result as a source"
        raise UserErrors([UserError(method.where, what, fix)])
    errors: list[UserError] = []
    for key, node in tree.value.items():
        if key in _REFUSED and node.value:
            errors.append(UserError(node.where, f"is refused: {_REFUSED[key]}", "remove it"))
        elif key not in (*_KEYS, *_REFUSED):
            near = near_key(key, _KEYS).removeprefix("; ") or "remove it"
            errors.append(UserError(node.where, "is no key of mergekit-moe", near))
    plain = _plain(tree)
    mode, dtype = plain.get("gate_mode", "hidden"), plain.get("dtype")
    if mode not in _MODES:
        fix = f"use one of {', '.join(_MODES)}"
        errors.append(
            UserError(tree.value["gate_mode"].where, f"{mode!r:.40} is not supported", fix)
        )
    if dtype is not None and dtype not in _DTYPES:
        fix = f"use one of {', '.join(_DTYPES)}"
        errors.append(UserError(tree.value["dtype"].where, f"{dtype!r:.40} is not supported", fix))
    base = _path(tree.value["base_model"], errors)
    sources, positive, negative = _experts(tree, mode, errors)
    if errors:
        raise UserErrors(errors)
    asked = {
        "sources": [*sources, f"{BASE}={base}"],
        "base": BASE,
        "tokenizer": BASE,
        "moe_router_topk": plain.get("experts_per_token", 2),
        **({} if dtype is None else {"dtype": _DTYPES[dtype]}),
        # Theirs are drawn with deviation 1; rows of prompts come out of a file.
        **({"router_init": "normal", "router_init_std": 1.0} if mode == "random" else {}),
    }
    gates = Gates(mode=mode, positive=positive, negative=negative)
    return tree_of(asked, tree.file), None if mode == "random" else gates


def _experts(
    tree: Node, mode: str, errors: list[UserError]
) -> tuple[list[str], tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """``NAME=DIR`` of every expert, and the prompts of each."""
    node = tree.value.get("experts")
    if node is None or not isinstance(node.value, list) or not node.value:
        where = tree.where if node is None else node.where
        errors.append(UserError(where, "experts are missing", "list at least two"))
        return [], (), ()
    sources, prompts, taken = [], [], {BASE}
    for place, entry in enumerate(node.value):
        entries = entry.value if isinstance(entry.value, dict) else {}
        if "source_model" not in entries:
            errors.append(UserError(entry.where, "names no source_model", "add it"))
            continue
        for key, one in entries.items():
            if key in _EXPERT_REFUSED:
                nothing, why = _EXPERT_REFUSED[key]
                if one.value is not None and one.plain() != nothing:
                    errors.append(UserError(one.where, f"is refused: {why}", "remove it"))
            elif key not in _EXPERT_KEYS:
                near = near_key(key, _EXPERT_KEYS).removeprefix("; ") or "remove it"
                errors.append(UserError(one.where, "is no key of an expert", near))
        path = _path(entries["source_model"], errors)
        label = _label(path, place, taken)
        sources.append(f"{label}={path}")
        both = [_prompts(entries.get(k), errors) for k in ("positive_prompts", "negative_prompts")]
        if mode in _OF_PROMPTS and not both[0]:
            what = "has no positive_prompts, which its router's row is made of"
            errors.append(UserError(entry.where, what, "add some, or gate_mode: random"))
        prompts.append(both)
    if mode in _OF_PROMPTS and len(prompts) > 1 and all(one == prompts[0] for one in prompts[1:]):
        what = "have the same prompts, so that no router could tell them apart"
        errors.append(UserError(node.where, what, "give each expert its own, or gate_mode: random"))
    return sources, tuple(p for p, _ in prompts), tuple(n for _, n in prompts)


def _label(path: str, place: int, taken: set[str]) -> str:
    """An expert's name, which no other has, nor the base: its directory's, as ``NAME=DIR`` can have
    it."""
    name = Path(path).name.replace("=", "-") or "expert"
    label = name
    while label in taken:
        label, place = f"{name}-{place}", place + 1
    taken.add(label)
    return label


def _path(node: Node, errors: list[UserError]) -> str:
    """A model's directory."""
    path = node.value
    if not isinstance(path, str) or not path:
        fix = "write the directory of a model"
        errors.append(UserError(node.where, f"is {node.kind}, no path", fix))
        return ""
    if "+" in path and not Path(path).exists():
        what = f"{path} names an adapter behind a plus sign"
        errors.append(UserError(node.where, what, "merge the adapter into the model first"))
    return path


def _prompts(node: Node | None, errors: list[UserError]) -> tuple[str, ...]:
    if node is None or node.value is None:
        return ()
    texts: list[Any] = [one.value for one in node.value] if isinstance(node.value, list) else [None]
    if not all(isinstance(text, str) and text for text in texts):
        errors.append(UserError(node.where, "is no list of texts", 'write - "a prompt"'))
        return ()
    return tuple(texts)


def _plain(tree: Node) -> dict[str, Any]:
    return {key: node.value for key, node in tree.value.items()}


_MADE_FOR = "mergekit"
"""Key, in the metadata of a file of rows, of what they were made for."""


def write_rows(gates: Gates, base: Path, experts: Sequence[str], file: Path) -> None:
    """The routers' rows, as ``btx centroids`` would write them. Those that were made for the same
    are written anew; where they are equal, the file stays, and an interrupted mix goes on.

    Args:
        gates: the prompts.
        base: the base model, a Hugging Face directory.
        experts: the experts' labels.
        file: of fp32 rows [H], of unit length.

    Raises:
        UserError: another file has this name, or as of :func:`rows_of`.
    """
    from safetensors.torch import load_file, save

    asked = json.dumps([astuple(gates), str(base.resolve()), *experts])
    made_for = hashlib.sha256(asked.encode()).hexdigest()
    check_file(file)
    if file.exists() and _made_for(file) != made_for:
        what = "exists already, and holds no router rows of these prompts, which are kept there"
        raise UserError(str(file), what, "remove it, or give --out another name")
    rows = rows_of(gates, base, experts)
    if file.exists() and _equal(rows, load_file(file)):
        return
    with written(file, "wb") as new:
        new.write(save(rows, {"router_init": "centroids", _MADE_FOR: made_for}))


def _equal(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether tensors are the same; the bytes of a file of them need not be."""
    import torch

    same = some.keys() == others.keys()
    return same and all(torch.equal(some[name], others[name]) for name in some)


def _made_for(file: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError):
        return None
    return metadata.get(_MADE_FOR)


def rows_of(gates: Gates, base: Path, experts: Sequence[str]) -> dict[str, Any]:
    """The routers' rows, fp32 [H], under the names that ``btx centroids`` gives them.

    Raises:
        UserError: transformers is missing or cannot read the base model, or the model makes no
            direction of a prompt.
    """
    import torch

    from megatron_btx.recipe.names import ROUTER

    found = _hidden(base) if gates.mode == "hidden" else _embedded(base)
    rows = {}
    for label, positive, negative in zip(experts, gates.positive, gates.negative, strict=True):
        direction = found(positive)  # [layers, H]
        if negative:
            direction = direction - found(negative)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        for layer, row in enumerate(direction.float()):
            rows[f"decoder.layers.{layer}.{ROUTER}/{label}"] = row.contiguous()
    if not all(torch.isfinite(row).all() for row in rows.values()):
        raise UserError("base_model", f"{base} computes NaN on the prompts", "give another")
    return rows


def _read_model(base: Path) -> tuple[Any, Any]:
    try:
        import transformers
    except ImportError:
        what = "needs transformers, to read the prompts"
        raise UserError("gate_mode", what, "pip install 'megatron-btx[hf]', or random") from None
    if not (base / "config.json").is_file():
        raise UserError("base_model", f"{base} is no Hugging Face directory", "give one")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype="auto", trust_remote_code=False
        )
    except Exception as error:  # what transformers raises of a directory has many types
        reason = shown((str(error).strip() or type(error).__name__).splitlines()[0])
        what = f"transformers cannot read {base}, which reads the prompts: {reason}"
        fix = "give a model with its tokenizer, or gate_mode: random"
        raise UserError("base_model", what, fix) from error
    return tokenizer, model.eval()


def _ids(tokenizer: Any, model: Any, prompt: str) -> Any:
    """[1, tokens]: the begin token, where there is one, and the prompt's own."""
    text = (tokenizer.bos_token or "") + prompt
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not ids.numel():
        raise UserError("positive_prompts", f"{shown(prompt)!r} has no token", "write another")
    if int(ids.max()) >= len(model.get_input_embeddings().weight):
        what = f"of {shown(prompt)!r} has a token for which the base model has no row"
        raise UserError("base_model", f"the tokenizer {what}", "give the model's own tokenizer")
    return ids


def _hidden(base: Path) -> Any:
    """Mean over the prompts of what every layer is given at the last token, [layers, H]."""
    import torch

    tokenizer, model = _read_model(base)

    @torch.no_grad()
    def of(prompts: Sequence[str]) -> Any:
        each = []
        for prompt in prompts:
            states = model(_ids(tokenizer, model, prompt), output_hidden_states=True).hidden_states
            each.append(torch.stack([state[0, -1] for state in states[:-1]]).float())
        return torch.stack(each).mean(0)

    return of


def _embedded(base: Path) -> Any:
    """The direction of the sum of all tokens' embeddings, the same for every layer, [layers, H]."""
    import torch

    tokenizer, model = _read_model(base)
    table = model.get_input_embeddings().weight.detach().float()

    def of(prompts: Sequence[str]) -> Any:
        each = [table[_ids(tokenizer, model, prompt)[0]].sum(0) for prompt in prompts]
        total = torch.stack(each).sum(0)
        row = total / total.norm().clamp(min=1e-8)
        return row.expand(model.config.num_hidden_layers, -1)

    return of
