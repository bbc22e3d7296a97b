"""Which models can be computed at all, whoever describes them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_btx.recipe import count
from megatron_btx.recipe.check_layout import Problem
from megatron_btx.recipe.schema import Model


def problems(model: Model) -> Iterator[Problem]:
    """Fields of a model that do not go together, by their names."""
    heads, groups = model.num_attention_heads, count.query_groups(model)
    if model.kv_channels is None and model.hidden_size % heads:
        yield Problem(
            "hidden_size",
            f"{model.hidden_size} is not divisible by num_attention_heads ({heads})",
            "change one of them, or give kv_channels",
        )
    elif count.kv_channels(model) % 2:
        yield Problem(
            "kv_channels",
            f"{count.kv_channels(model)} channels a head is odd, and rotary positions need pairs",
            "choose an even width",
        )
    if heads % groups:
        yield Problem(
            "num_query_groups",
            f"{groups} does not divide num_attention_heads ({heads})",
            f"choose one of {', '.join(str(n) for n in _divisors(heads))}",
        )
    yield from _windows(model)


def _windows(model: Model) -> Iterator[Problem]:
    window, freq = model.window_size, model.window_attn_skip_freq
    if window is not None and (len(window) != 2 or window[1] != 0):
        what = f"is {list(window)}; a token may see those before it and itself"
        yield Problem("window_size", what, "write [n, 0]: the n before it and itself")
    if freq is None:
        return
    if window is None:
        yield Problem("window_attn_skip_freq", "there is no window", "give window_size")
    if len(freq) != model.num_layers:
        fix = f"give {model.num_layers} numbers, 1 for a layer with the window and 0 without"
        yield Problem("window_attn_skip_freq", f"is {list(freq)}", fix)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
