"""A page of slides: what was taken of each and why the rest was not, sorted and searched in it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

from latentds_tools.reports import html_pages

from latentds.core.display import html_text
from latentds.store.slide_records import SlideRecord

STYLE = """
body{max-width:1560px}
.find{display:flex;flex-wrap:wrap;gap:.6rem;margin:1rem 0;align-items:center}
.find input,.find select{font:inherit;padding:.3rem .5rem;max-width:100%}
.find input{flex:1 1 12rem}
.slides{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.slide{border:1px solid #dde2ea;padding:10px;overflow-wrap:anywhere;min-width:0}
.slide img{max-width:100%;height:auto;display:block;margin:0 auto .4rem}
.slide h3{font-size:.95rem;margin:.2rem 0} .slide p{margin:.15rem 0;font-size:13px;color:#4b5567}
.slide .why{color:#8a3b12}
:target{outline:3px solid #4a72b8}
"""
SCRIPT = """
const box=document.querySelector('.slides'),cards=[...box.children];
const word=document.querySelector('.find input'),order=document.querySelector('.find select');
const shown=document.querySelector('.find output');
function arrange(){
 const key=order.value,words=word.value.toLowerCase().split(/\\s+/).filter(Boolean);
 const by=(a,b)=>key==='name'?a.dataset.name.localeCompare(b.dataset.name,'en',{numeric:true})
  :Number(b.dataset[key])-Number(a.dataset[key]);
 cards.sort(by).forEach(card=>box.append(card));
 cards.forEach(card=>{const text=card.textContent.toLowerCase();
  card.hidden=!words.every(one=>text.includes(one));});
 shown.textContent=cards.filter(card=>!card.hidden).length+' of '+cards.length;
}
word.oninput=order.onchange=arrange;arrange();
"""
SORTS = {"name": "name", "patches": "patches", "tissue": "tissue", "out": "left out"}


def slide_page(
    title: str,
    records: Sequence[SlideRecord],
    figures: Mapping[str, Sequence[str]],
    figure_px: int = 200,
) -> str:
    """The page's HTML.

    figures    HTML of decoded patches by the name of their slide
    figure_px  least width of one
    """
    ordered = sorted(records, key=lambda record: record.name)
    numbers = {record.name: number for number, record in enumerate(ordered)}
    cards = "".join(card(one, numbers[one.name], len(figures.get(one.name, ()))) for one in ordered)
    options = "".join(f'<option value="{key}">{name}</option>' for key, name in SORTS.items())
    controls = (
        '<div class="find"><input type="search" aria-label="Search" '
        'placeholder="name, split, label, reason">'
        f"<label>by <select>{options}</select></label><output></output></div>"
    )
    sections = [summary(ordered), controls, f'<div class="slides">{cards}</div>']
    if figures:
        sections.append(html_pages.heading("Decoded patches"))
    for name in sorted(figures, key=lambda name: numbers.get(name, -1)):
        sections.append(heading(name, numbers.get(name)))
        sections.append(html_pages.grid(figures[name], figure_px))
    lead = (
        "Outlined in green is what counts as tissue, in blue what was taken. Not for diagnosis. "
        "The pictures show patients' tissue: share the page as you would share the slides."
    )
    return html_pages.page(title, lead, sections, STYLE, SCRIPT)


def summary(records: Sequence[SlideRecord]) -> str:
    taken = [record for record in records if record.patches]
    rows = [
        ("slides", f"{len(records):,}"),
        ("with patches", f"{len(taken):,}"),
        ("without", f"{len(records) - len(taken):,}"),
        ("patches", f"{sum(record.patches for record in records):,}"),
    ]
    return html_pages.table(["", "all"], rows)


def card(record: SlideRecord, number: int, decoded: int) -> str:
    picture = ""
    if record.picture_jpeg is not None:
        data = base64.b64encode(record.picture_jpeg).decode()
        picture = f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{data}">'
    lines = [f"<p>{html_text(line)}</p>" for line in facts(record)]
    lines += [f'<p class="why">{html_text(reason)}</p>' for reason in record.left_out]
    if decoded:
        word = "patch" if decoded == 1 else "patches"
        lines.append(f'<p><a href="#p{number}">{decoded} decoded {word}</a></p>')
    return (
        f'<article class="slide" id="s{number}" data-name="{html_text(record.name)}" '
        f'data-patches="{record.patches}" data-tissue="{record.tissue or 0:.4f}" '
        f'data-out="{record.places - record.patches if record.places else 1 << 31}">'
        f"{picture}<h3>{html_text(record.name)}</h3>{''.join(lines)}</article>"
    )


def facts(record: SlideRecord) -> list[str]:
    kind = " · ".join(word for word in (record.split, record.label) if word)
    if not record.places:
        return [kind] if kind else []
    counts = f"{record.patches:,} of {record.places:,} places taken"
    tissue = "" if record.tissue is None else f" · {100 * record.tissue:.0f} % tissue"
    return [line for line in (kind, counts + tissue, resolution(record)) if line]


def resolution(record: SlideRecord) -> str:
    """Micrometres a pixel of patches and slide, and a patch's width in the slide's pixels."""
    mpp = "mpp unknown" if record.mpp is None else f"mpp {record.mpp:.4g}"
    own = "" if record.mpp_level0 is None else f" (level 0: {record.mpp_level0:.4g})"
    return f"{mpp}{own}" + (f", a patch {record.size_px:,} px of level 0" if record.size_px else "")


def heading(name: str, number: int | None) -> str:
    """The heading of a slide's decoded patches, which leads back to it."""
    shown = html_text(name or "no slide")
    if number is None:
        return f"<h3>{shown}</h3>"
    return f'<h3 id="p{number}"><a href="#s{number}">{shown}</a></h3>'
