"""SVG text, the one place where it is written: every attribute and every text is escaped."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that an XML document cannot hold."""

FONTS = "Arial,'Liberation Sans','DejaVu Sans','Noto Sans',sans-serif"
"""Of a picture that stands alone. What turns it into a PNG takes ``sans-serif`` for Arial, and
leaves text out where that is not installed: the others are named."""


def element(tag: str, *content: str | Markup, **attributes: str | float | None) -> Markup:
    """``<tag attributes>content</tag>``.

    Args:
        tag: its name.
        content: text, which is escaped, and elements, which are not.
        attributes: ``text_anchor`` is ``text-anchor``, ``class_`` is ``class``; of numbers one
            decimal is written, of ``None`` nothing.
    """
    inside = "".join(map(_text, content))
    names = (
        f' {name.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{''.join(names)}>{inside}</{tag}>")


def document(width: float, height: float, *content: str | Markup, style: str = "") -> Markup:
    """An SVG file, whole in itself: size, namespace and style sheet are in it."""
    return element(
        "svg",
        element("style", Markup(style)) if style else "",
        *content,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width:g} {height:g}",
        font_family=FONTS,
        font_size="11",
    )


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return _text(value)
    return f"{value:.1f}".removesuffix(".0")


def _text(value: str | Markup) -> str:
    return _NO_XML.sub("\ufffd", str(escape(value)))
