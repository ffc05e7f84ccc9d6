"""Self-contained HTML pages: pictures inside, no network, and no script unless one is given."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from latentds.codecs.formats import save_with_pillow
from latentds.core.display import html_text

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1120px;padding:0 1rem;
color:#1d2330;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.1rem;margin-top:2rem}
p.lead{color:#4b5567;margin-top:0}
table{border-collapse:collapse;margin:.6rem 0;display:block;max-width:100%;overflow-x:auto}
th,td{padding:.3rem .8rem;border-bottom:1px solid #dde2ea;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
pre{background:#f3f5f9;padding:.8rem;overflow-x:auto}
.grid{display:grid;gap:14px}
figure{margin:0} figure img{width:100%;image-rendering:auto;display:block;border:1px solid #dde2ea}
figcaption{font-size:12px;color:#4b5567;overflow-wrap:anywhere}
.row{display:grid;gap:10px;margin-bottom:14px}
"""


def page(title: str, lead: str, sections: Iterable[str], style: str = "", script: str = "") -> str:
    """A whole page; `title` and `lead` are text, sections are HTML.

    style, script  more of each than all pages have, our own words alone
    """
    code = f"<script>{script}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html_text(title)}</title>"
        f"<style>{STYLE}{style}</style></head><body><h1>{html_text(title)}</h1>"
        f'<p class="lead">{html_text(lead)}</p>{"".join(sections)}{code}</body></html>\n'
    )


def heading(text: str) -> str:
    return f"<h2>{html_text(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{html_text(text)}</p>"


def code(text: str) -> str:
    return f"<pre>{html_text(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; every column but the first is set as numbers."""

    def line(cells: Sequence[object], tag: str) -> str:
        shown = "".join(
            f"<{tag}{' class=n' if place else ''}>{html_text(str(cell))}</{tag}>"
            for place, cell in enumerate(cells)
        )
        return f"<tr>{shown}</tr>"

    return f"<table>{line(header, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def figure(image: np.ndarray, caption: str) -> str:
    """A picture, uint8 (H, W, 3), losslessly inside the page, with text below it."""
    return png_figure(save_with_pillow(image, "PNG"), caption)


def png_figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="" src="data:image/png;base64,{data}">'
        f"<figcaption>{html_text(caption)}</figcaption></figure>"
    )


def grid(figures: Iterable[str], least_px: int = 200) -> str:
    """Figures side by side, as many as fit at `least_px` each."""
    columns = f"grid-template-columns:repeat(auto-fill,minmax(min(100%,{least_px}px),1fr))"
    return f'<div class="grid" style="{columns}">{"".join(figures)}</div>'


def figure_row(figures: Sequence[str]) -> str:
    columns = f"grid-template-columns:repeat({len(figures)},1fr)"
    return f'<div class="row" style="{columns}">{"".join(figures)}</div>'


def of_markdown(
    text: str, pictures: Mapping[str, bytes | None], figures: Sequence[str] = ()
) -> str:
    """The page of a report's Markdown: a title, headings, tables, lists and paragraphs.

    pictures  PNG files by name, below the first paragraph
    figures   HTML of further ones below these
    """
    title, lead, *blocks = text.strip().split("\n\n")
    shown = [*(png_figure(file, name) for name, file in pictures.items() if file), *figures]
    return page(title.removeprefix("# "), lead, [*shown, *map(block_of_markdown, blocks)])


def block_of_markdown(block: str) -> str:
    """A heading, table, list or paragraph as HTML."""
    lines = block.splitlines()
    if block.startswith("#"):
        return heading(block.lstrip("# "))
    if block.startswith("|"):
        header, _, *rows = ([plain(cell) for cell in line[2:-2].split(" | ")] for line in lines)
        return table(header, rows)
    if all(line.startswith("- ") for line in lines):
        return f"<ul>{''.join(f'<li>{html_text(plain(line[2:]))}</li>' for line in lines)}</ul>"
    return paragraph(plain(block))


def plain(text: str) -> str:
    """Text without the marks of code and emphasis that reports have."""
    return re.sub(r"`([^`]*)`|\*\*([^*]*)\*\*", lambda found: found[1] or found[2], text)
