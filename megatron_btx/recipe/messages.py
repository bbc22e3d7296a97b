"""Text for people: types, values and near misses in errors, numbers as they may be written, plain
tables."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

ELSEWHERE = {
    # transformers: TrainingArguments and config.json
    "learning_rate": "lr",
    "max_steps": "steps",
    "warmup_steps": "lr_warmup_iters",
    "lr_scheduler_type": "lr_decay_style",
    "max_grad_norm": "clip_grad",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "adam_epsilon": "adam_eps",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "sliding_window": "window_size",
    "attention_bias": "add_qkv_bias",
    "initializer_range": "init_method_std",
    "num_experts_per_tok": "moe_router_topk",
    "router_aux_loss_coef": "balance_loss_coeff",
    # Megatron-LM's arguments, where ours is no argument of it
    "train_iters": "steps",
    "data_path": "train",
    "bf16": "precision",
    "fp16": "precision",
    # common short forms
    "seq_len": "seq_length",
    "sequence_length": "seq_length",
    "max_seq_length": "seq_length",
    "batch_size": "global_batch_size",
    "train_batch_size": "global_batch_size",
    "micro_batch": "micro_batch_size",
    "warmup": "lr_warmup_iters",
    "warmup_ratio": "lr_warmup_iters",
    "lr_scheduler": "lr_decay_style",
    "scheduler": "lr_decay_style",
    "grad_clip": "clip_grad",
    "wd": "weight_decay",
    "dtype": "precision",
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "dp": "data_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "top_k": "moe_router_topk",
    "topk": "moe_router_topk",
    "num_tokens": "tokens",
    "epochs": "tokens",
    "num_epochs": "tokens",
    "num_train_epochs": "tokens",
}
"""The keys of a recipe that stand for what other trainers call otherwise."""
MEANT = {("seed", int): "random_seed"}
"""A block, and the type of a value in its place: the key that such a value is probably for."""
SUFFIXES = {"K": 3, "M": 6, "B": 9, "G": 9, "T": 12}
"""What may follow a number, small or capital: the power of ten that it stands for."""


def yaml_name(field_name: str) -> str:
    """The key of a field: ``from_`` is written ``from``, a keyword of Python."""
    return field_name.rstrip("_")


def flag_of(field_name: str) -> str:
    """A field as a flag: ``router_init`` is ``--router-init``."""
    return "--" + field_name.replace("_", "-")


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union type, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def number(value: Any) -> int | float | None:
    """A finite number: YAML's own, ``1e-4`` (text for YAML 1.1), ``60k`` and ``80B``."""
    if isinstance(value, str):
        match = re.fullmatch(
            r"([+-]?(?!0\d)[\d_]*\.?\d+(?:[eE][+-]?\d+)?)\s*([KMBGTkmbgt]?)", value.strip()
        )
        if match is None or len(value) > 100:
            return None
        digits, power = match[1].replace("_", ""), SUFFIXES.get(match[2].upper(), 0)
        if power and "e" not in digits.lower():
            # by decimal text, so that 1.1B is 1_100_000_000 and not a neighbour
            digits, power = f"{digits}e{power}", 0
        value = float(digits) * 10**power
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, int) or math.isfinite(value) else None


def describe(hint: Any) -> str:
    """A type in a user's words."""
    words: list[str] = []
    for option in options(hint):
        if typing.get_origin(option) is Literal:
            words += typing.get_args(option)
        elif typing.get_origin(option) is tuple:
            lists = {str: "text or a list of texts", float: "a list of numbers"}
            words.append(lists.get(typing.get_args(option)[0], "a list of whole numbers"))
        elif typing.get_origin(option) is dict:
            words.append("a mapping")
        elif dataclasses.is_dataclass(option):
            words.append("a block of keys")
        elif option is not type(None):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(names[option])
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def show(value: Any) -> str:
    """A value as an error quotes it."""
    if value is None:
        return "empty"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 10_000:  # Python writes no longer ones
        return "a number without end"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:20]}... ({len(text)} characters)"


def path_problem(text: str) -> str | None:
    """Why no file system has a place for a path, if none has."""
    if not text:
        return "is empty"
    try:
        names = os.fsencode(text).split(b"/")
    except UnicodeEncodeError:
        return f"{ascii(text)} is no text that can name a file"
    if "\0" in text:
        return f"{show(text)} has a NUL character in it"
    if max(map(len, names)) > 255 or len(text) > 3000:
        return f"{show(text)} is too long for a path"
    return None


def guess(value: Any, choices: typing.Iterable[Any]) -> str:
    """``; did you mean ...?`` where one of the choices is near, else nothing."""
    near = _near(str(value).lower(), map(str, choices))
    return f"; did you mean {near}?" if near else ""


def _near(name: str, choices: typing.Iterable[str]) -> str | None:
    """The choice that is nearest to a name; none is sought where that would take long."""
    choices = list(itertools.islice(choices, 500))
    near = get_close_matches(name, choices, n=1) if len(name) <= 200 else []
    return near[0] if near else None


def near_key(name: str, keys: typing.Iterable[str]) -> str:
    """:func:`guess` for keys, which errors write in backticks."""
    near = _near(name, keys)
    return f"; did you mean `{near}`?" if near else ""


def nearest(
    name: str, fields: typing.Iterable[str], key: str, homes: typing.Iterable[str] = ()
) -> str:
    """What an unknown key may have meant: a key of another block (one of ``homes``, dotted), what
    other trainers call so, or the nearest name."""
    here = list(fields)
    if (meant := MEANT.get((name, int))) is not None and name not in here:
        return f"did you mean `{meant}`, at the top of the recipe?"
    if "." in name and name in homes:  # dotted, as errors and `btx keys` write it
        first, *inner = name.split(".")
        nested = "".join(f"{{{part}: " for part in inner)
        return f"write it under its block: `{first}: {nested}...{'}' * len(inner)}`"
    others = [home for home in homes if home.rsplit(".", 1)[-1] == name]
    if others:
        return "it belongs in " + " or ".join(f"`{home}`" for home in others[:3])
    ours = ELSEWHERE.get(name.lower().replace("-", "_"))
    if ours not in here and (near := _near(name, here)):
        return f"did you mean `{near}`?"
    places = [ours] if ours in here else [h for h in homes if h.rsplit(".", 1)[-1] == ours]
    if places:
        return "did you mean " + " or ".join(f"`{place}`" for place in places[:3]) + "?"
    return f"the keys {'of ' + key if key else 'here'} are: {', '.join(here[:100])}"


def block_of(cls: Any, value: Any, key: str) -> str:
    """What to write instead of a value that stands where a block should, of the dataclass."""
    fields = dataclasses.fields(cls)
    names = ", ".join(yaml_name(one.name) for one in fields[:4])
    fix = f"give keys under it: {names}, ..."
    if value is True and not any(required(one) for one in fields):
        return f"`{key.rpartition('.')[2]}: {{}}` has its defaults; or {fix}"
    if value is False:
        return f"`{key.rpartition('.')[2]}: null` is as if it were not there; or {fix}"
    if (meant := MEANT.get((key, type(value)))) is not None:
        return f"did you mean `{meant}`? Else {fix}"
    return fix


def required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def homes(cls: Any, key: str = "") -> list[str]:
    """Every dotted key of a block, names of a mapping's entries written ``*``."""
    found: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        dotted = f"{key}.{yaml_name(name)}".lstrip(".")
        found.append(dotted)
        for option in options(hint):
            if dataclasses.is_dataclass(option):
                found += homes(option, dotted)
            elif typing.get_origin(option) is dict:
                item = typing.get_args(option)[1]
                found += homes(item, f"{dotted}.*") if dataclasses.is_dataclass(item) else []
    return found


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a plain-text table: two spaces between columns, the first ``left`` of them
    aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``3:05:10``."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def amount(number: float) -> str:
    """``950``, ``12.3k``, ``4.56M``, ``533B``: three digits that matter."""
    for limit, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{sign}"
    return f"{number:.3g}"
