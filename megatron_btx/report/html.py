"""Pages from the templates beside this file; every value is escaped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_btx.report.style import sheet

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
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
