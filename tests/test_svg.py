"""SVG: nothing that is shown can become markup, and every document is well-formed."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from megatron_btx import svg
from megatron_btx.mix import drift

BAD = '<script>alert("1")</script>&\'\x1b[31m'


@given(st.text(), st.text())
def test_any_text_in_any_place(shown: str, name: str) -> None:
    made = svg.document(10, 5.5, svg.element("text", shown, text_anchor=name, x=1.25), style="a{}")
    root = ElementTree.fromstring(made)
    (style, text) = root
    assert style.text == "a{}"
    assert text.get("x") == "1.2"
    assert set(root.attrib) >= {"width", "height", "viewBox"}
    assert made.count("<") == 6
    assert len(text.text or "") <= len(shown)


def test_a_source_label_in_drift_svg() -> None:
    rows = [{"models": [BAD, "seed"], "group": "ffn", "layer": 0, "relative_l2": 0.5}]
    picture = drift._heatmap(rows)
    root = ElementTree.fromstring(picture)
    assert "<script" not in picture
    words = "".join(root.itertext())
    assert '<script>alert("1")</script>' in words
    assert "\x1b" not in words
