"""The look of the page: one style sheet, light and dark, wide and narrow."""

from __future__ import annotations

import re

SERIES = 8
"""Colours before they repeat; from the second round on, lines are dashed."""

CSS = """
:root{color-scheme:light dark;
--page:#f7f6f3;--card:#ffffff;--ink:#1c1d21;--soft:#5b6069;--line:#dfdcd5;--grid:#ebe8e2;
--good:#e3f1e8;--heat:#0b5fa5;--on-heat:#ffffff;
--btx:#c2410c;--dense:#1c1d21;
--s0:#0b62a8;--s1:#00795c;--s2:#8f3f97;--s3:#8a6d00;--s4:#2f7d9e;--s5:#b3261e;--s6:#4b5bb5;--s7:#6b7280}
@media (prefers-color-scheme:dark){:root{
--page:#131417;--card:#1c1e23;--ink:#eceae6;--soft:#a4a9b3;--line:#353941;--grid:#2a2d34;
--good:#1d3529;--heat:#58aef5;--on-heat:#0d1117;
--btx:#ff9a62;--dense:#f2f0ec;
--s0:#6bb4f5;--s1:#4fcba1;--s2:#dd95e3;--s3:#e4c358;--s4:#7fd1ea;--s5:#ff8f85;--s6:#a3aef5;--s7:#9aa3b0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 20px 72px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .3rem;letter-spacing:-.02em}
h2{font-size:1.3rem;margin:3rem 0 .4rem;letter-spacing:-.01em}
h3{font-size:.95rem;margin:0 0 .35rem;font-weight:600}
p{max-width:46rem;margin:.4rem 0 1rem}.soft,figcaption,.note{color:var(--soft)}
.note{font-size:.9rem;margin:1.2rem 0 .5rem}
.verdict{font-size:1.12rem;max-width:46rem;margin:.6rem 0 1.4rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:1.4rem 0}
.tile b{display:block;font-size:1.55rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;
font-variant-numeric:tabular-nums}.tile span{font-size:.85rem;color:var(--soft)}
.scroll{overflow-x:auto;padding:4px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.93rem}
th,td{padding:8px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:14px}
thead th{font-weight:600;color:var(--soft);font-size:.85rem;vertical-align:bottom}
tbody tr:last-child td,tbody tr:last-child th{border-bottom:0}
tbody th{font-weight:500}tr.btx th,tr.btx td{font-weight:650}
td.best{background:var(--good);border-radius:4px}td.best::after{content:" ★";font-size:.75em}
td:not(.best).score::after{content:" ★";font-size:.75em;visibility:hidden}
th.left,td.left{text-align:left}td.mean,th.mean{border-left:1px solid var(--line)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,310px),1fr));gap:14px}
.panels.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,235px),1fr))}
figure{margin:0}figcaption{font-size:.88rem;margin-top:.5rem;max-width:46rem}
svg{display:block;width:100%;height:auto;overflow:visible}
.wide svg{max-width:720px;margin:0 auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:0 0 12px;padding:0;
font-size:.9rem}.legend svg{display:inline-block;width:30px;height:12px;margin-right:7px;
vertical-align:-1px}
text{fill:var(--ink);font:11px system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
text.tick,text.label{fill:var(--soft)}text.mark{font-weight:600;font-size:12px;
paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--line);stroke-width:1}
.leader{stroke:var(--soft);stroke-width:.8;opacity:.6}
.curve{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round;stroke:var(--c)}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1}
.train{--c:var(--soft)}.curve.train{stroke-width:1;opacity:.7}
.btx-line{--c:var(--btx)}.dense-line{--c:var(--dense)}.seed-line{--c:var(--soft)}
.curve.btx-line,.curve.dense-line{stroke-width:2.4}.curve.dense-line{stroke-dasharray:7 4}
.cell{fill:var(--heat);stroke:var(--line);stroke-width:.5}
text.value{font-size:10.5px;font-variant-numeric:tabular-nums}
text.value.strong{fill:var(--on-heat)}
details{margin:.8rem 0}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;font:.82rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,monospace;
margin:.8rem 0 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:.93rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
footer{margin-top:3rem;color:var(--soft);font-size:.88rem}
a{color:inherit}
@media (max-width:640px){main{padding:24px 14px 48px}h1{font-size:1.55rem}
.wide text{font-size:14px}.wide text.mark{font-size:15px}.card{padding:13px 12px}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px}}
@media print{body{background:#fff}.card{break-inside:avoid}}
"""


def series(index: int) -> str:
    """CSS class of the line at ``index``: colour, and dashes where colours repeat."""
    return f"l{index % SERIES}" + (" again" if index >= SERIES else "")


def sheet() -> str:
    """The whole style sheet."""
    return CSS.strip() + "".join(_lines("var(--s{})"))


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
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", CSS.partition("@media")[0]))
    colours["card"] = "#ffffff"
    drawn = ("text", ".grid", ".axis", ".leader", ".curve", ".dot", ".cell")
    rules = [
        line
        for line in re.findall(r"[^{}]+\{[^{}]*\}", CSS.partition("@media (max")[0])
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
    return re.sub(r"font:(\S+) [^;}]*", r"font-family:sans-serif;font-size:\1", text)
