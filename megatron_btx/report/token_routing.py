"""The routing of a text token by token, as ``evaluate.token_routing`` measures it: table and page.
Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_btx.errors import shown
from megatron_btx.pipeline.stage_tables import columns
from megatron_btx.report import html

Gates = Mapping[str, float]
"""Of the experts that a token got, the largest first."""


def layers_shown(count: int) -> list[int]:
    """From 0: all of up to four; of more the first, the middle and the last."""
    return list(range(count)) if count <= 4 else [0, count // 2, count - 1]


def table(text: Mapping[str, Any]) -> str:
    """A line for each token of a text: its experts and their gates, in the layers shown."""
    chosen = layers_shown(len(text["gates"]))
    head = ["token", *(f"layer {layer + 1}" for layer in chosen)]
    rows = [
        [shown(repr(token), 24), *(_in_words(text["gates"][layer][place]) for layer in chosen)]
        for place, token in enumerate(text["tokens"])
    ]
    return columns(head, rows)


def _in_words(gates: Gates) -> str:
    return ", ".join(f"{expert} {gate:.2f}" for expert, gate in gates.items())


def page(name: str, found: Mapping[str, Any]) -> str:
    """The texts in colour, once for each layer shown: a token's is that of its largest gate, fuller
    for a larger one; the others are in its tooltip. Needs no network."""
    experts: Sequence[str] = found["experts"]
    colours = {expert: html.series(at) for at, expert in enumerate(experts)}
    texts = []
    for text in found["texts"]:
        layers = []
        for layer in layers_shown(len(text["gates"])):
            spans = []
            for token, gates in zip(text["tokens"], text["gates"][layer], strict=True):
                # None of a token whose gates are no numbers: the model computes NaN.
                best, gate = next(iter(gates.items()), (experts[0], 0.0))
                spans.append((token, colours[best], round(100 * gate), _in_words(gates)))
            layers.append((layer + 1, spans))
        texts.append(layers)
    return html.render("token_routing.html", name=name, legend=colours, texts=texts)
