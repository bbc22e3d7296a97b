"""Pages from the templates beside this file, every value escaped; and their style sheet, of which a
picture that stands alone takes a part."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_btx.svg import FONTS

_TEMPLATES = Path(__file__).with_name("templates")

SERIES = 8
"""Colours before they repeat; from the second round on, lines are dashed."""

Cell = tuple[str, str]
"""Text and CSS class of a table's cell."""


def render(template: str, **values: Any) -> str:
    """A page, whole: its style is in it, it needs no network.

    Args:
        template: name of a file in ``templates/``.
        values: what it is filled with; pictures come as ``Markup``.
    """
    return _environment().get_template(template).render(style=Markup(sheet()), **values)


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def series(index: int) -> str:
    """CSS class of the line at ``index``: colour, and dashes where colours repeat."""
    return f"l{index % SERIES}" + (" again" if index >= SERIES else "")


@functools.cache
def _css() -> str:
    return (_TEMPLATES / "style.css").read_text(encoding="utf-8").strip()


def sheet() -> str:
    """The whole style sheet."""
    return _css() + "".join(_lines("var(--s{})"))


_DASHES = ("", "6 3", "2 3", "9 3 2 3", "4 2", "1 3", "8 4", "3 2 1 2")


def _lines(colour: str) -> list[str]:
    """The rules of the series."""
    rules = []
    for index, dash in enumerate(_DASHES):
        dashes = f".curve.l{index}{{stroke-dasharray:{dash or 'none'}}}"
        rules.append(f".l{index}{{--c:{colour.format(index)}}}{dashes}")
    return [*rules, ".curve.again{stroke-width:2.6;opacity:.7}"]


def picture_sheet() -> str:
    """The rules of pictures alone, light, without variables, which many readers of SVG files do not
    know; for an SVG file that is whole in itself."""
    css = _css()
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", css.partition("@media")[0]))
    colours["card"] = "#ffffff"
    drawn = ("text", ".grid", ".axis", ".bar", ".leader", ".curve", ".dot", ".cell")
    rules = [
        line
        for line in re.findall(r"[^{}]+\{[^{}]*\}", css.partition("@media (max")[0])
        if line.strip().startswith(drawn)
    ]
    for style, colour in (
        *((f"l{index}", colours[f"s{index}"]) for index in range(SERIES)),
        *(("train", colours["soft"]), ("seed-line", colours["soft"])),
        *(("btx-line", colours["btx"]), ("dense-line", colours["dense"])),
    ):
        rules.append(f".curve.{style}{{stroke:{colour}}}.dot.{style}{{fill:{colour}}}")
    rules += [rule.partition("}")[2] for rule in _lines("")[:-1]] + _lines("")[-1:]
    rules.append(".paper{fill:#ffffff}")
    text = "".join(rule.strip() for rule in rules)
    text = re.sub(r"var\(--([\w-]+)\)", lambda found: colours.get(found[1], "none"), text)
    return re.sub(r"font:(\S+) [^;}]*", rf"font-family:{FONTS};font-size:\1", text)
