"""The report as Markdown: the tables, the paper's figures beside ours, the notes; and its pictures.

These are some crops, as Fig. 1 of the paper, originals beside what every codec makes of them; and
rate against fidelity, as its Fig. 2, a panel an embedder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.fidelity_crops import Crop
from latentds_tools.reports import html_pages
from latentds_tools.reports.markdown import bracketed, bullets, number, table
from latentds_tools.reports.plots import make_panels, saved

SHOWN = 3
PANEL_IN, DPI = (5.2, 4.2), 150  # width and height in inches
MARKERS = {"picture": "s", "latent": "o"}


def write_page(report: dict[str, Any]) -> str:
    parts = ["# Fidelity of codecs", lead(report)]
    for name, counts in report["groups"].items():
        if name != "all":
            parts.append(f"## Crops of {name} files only")
            parts.append(f"Crops: {counts['crops']:,}; slides: {counts['slides']:,}.")
        parts.append(main_table(report, name))
    parts += [differences_part(report, name) for name in references(report)]
    parts += [steps_part(report)] if any(row["steps"] for row in report["rows"]) else []
    parts += [paper_part(report)] if any(row["paper"] for row in report["rows"]) else []
    parts.append("## Notes\n\n" + bullets(notes(report)))
    return "\n\n".join(parts) + "\n"


def lead(report: dict[str, Any]) -> str:
    counts, config, where = report["groups"]["all"], report["config"], report["machine"]
    kinds = ", ".join(f"{count:,} {name}" for name, count in report["kinds"].items())
    return (
        f"{counts['crops']:,} crops of {config['crop_px']} px from {report['pictures']:,} pictures "
        f"({kinds}), seed {config['seed']}; {counts['slides']:,} slides: {report['slide_rule']}. "
        f"Rates on {where['gpu'] or where['cpu']} ({where['cores']} cores, "
        f"{where['torch_threads']} threads for torch), pictures one at a time on one core.\n\n"
        f"Means over crops, in brackets 95 % intervals by bootstrap over slides "
        f"({config['bootstrap']:,} rounds)."
    )


def main_table(report: dict[str, Any], group: str) -> str:
    names, figures = embedder_names(report), figure_names(report)
    header = ["codec", "bytes", "in container", "packed", *names, "PSNR, dB", "SSIM", *figures]
    rows = []
    for row in report["rows"]:
        values = row["groups"][group]
        rows.append([
            f"`{row['codec']}`",
            *(number(values[n], ",.0f") for n in ("bytes", "container_bytes", "packed_bytes")),
            *(interval(values["similarity"][name], 4) for name in names),
            psnr(values["psnr_db"]),
            interval(values["ssim"], 3),
            *(interval(values["downstream"][name], 3) for name in figures),
            *([rate(row["encode_rate"]), rate(row["decode_rate"])] if group == "all" else []),
        ])  # fmt: skip
    return table([*header, *(["encode/s", "decode/s"] if group == "all" else [])], rows)


def embedder_names(report: dict[str, Any]) -> list[str]:
    """Embedders, those that nothing was fitted to first."""
    return sorted(report["embedders"], key=lambda name: name in report["fitted_to"])


def figure_names(report: dict[str, Any]) -> list[str]:
    return list(report["rows"][0]["per_crop"]["downstream"])


def references(report: dict[str, Any]) -> list[str]:
    """Rows that others are compared with, in the table's order."""
    named = {name for row in report["rows"] for name in row["differences"]}
    return [row["codec"] for row in report["rows"] if row["codec"] in named]


def differences_part(report: dict[str, Any], reference: str) -> str:
    """How much rows of as many bytes are above a reference, crop by crop."""
    columns = [(f"similarity {name}", name, 4) for name in embedder_names(report)]
    columns += [("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 3)]
    columns += [(name, name, 3) for name in figure_names(report)]
    rows = []
    for row in report["rows"]:
        if reference in row["differences"]:
            found = row["differences"][reference]["all"]
            cells = [difference(found[name], digits) for name, _, digits in columns]
            rows.append([f"`{row['codec']}`", *cells])
    return "\n\n".join([
        f"## Less `{reference}`",
        f"A row's figure less that of `{reference}`, mean over the same crops; in brackets 95 % "
        "intervals by bootstrap over slides.",
        table(["codec", *(label for _, label, _ in columns)], rows),
    ])  # fmt: skip


def steps_part(report: dict[str, Any]) -> str:
    rows = []
    for row in report["rows"]:
        if row["steps"]:
            counts = row["steps"]["counts"]
            cells = [f"{value:g}" for value in row["steps"]["quantiles"]]
            rows.append(
                [f"`{row['codec']}`", *cells, f"{counts.get('0', 0):,}", f"{len(counts):,}"]
            )
    header = ["codec", "finest", "quarter", "median", "three quarters", "coarsest"]
    return "\n\n".join([
        "## Steps of records",
        "Indices of the quantization steps that crops' records have, 0 the finest there is; each "
        "step is a little coarser than the one before (`latentds info` has them of a set).",
        table([*header, "crops at 0", "different"], rows),
    ])  # fmt: skip


def paper_part(report: dict[str, Any]) -> str:
    names = [name for name in ("uni", "phikon-v2", "gigapath") if name in report["embedders"]]
    rows, remarks = [], list(report["paper_differences"])
    for row in report["rows"]:
        paper, ours = row["paper"], row["groups"]["all"]
        if not paper:
            continue
        pairs = [(paper["similarity"][n], ours["similarity"][n]["mean"], ".3f") for n in names]
        pairs += [(paper["ssim"], ours["ssim"]["mean"], ".3f")]
        pairs += [(paper["psnr_db"], ours["psnr_db"]["mean"], ".2f")]
        size = f"{paper['kilobytes']} / {ours['bytes'] / 1024:.1f}"
        cells = [f"{number(theirs, d)} / {number(own, d)}" for theirs, own, d in pairs]
        rows.append([f"`{row['codec']}`", paper["label"], size, *cells])
        if paper["note"]:
            remarks.append(f"`{row['codec']}`: {paper['note']}.")
    header = ["codec", "in the paper", "KB", *names, "SSIM", "PSNR, dB"]
    return "\n\n".join([
        "## Beside the paper's Table 1",
        "The paper's figure / ours. " + report["paper_source"] + ".",
        table(header, rows),
        bullets(remarks),
    ])  # fmt: skip


def notes(report: dict[str, Any]) -> list[str]:
    settings = report["settings"]
    found = [
        f"Similarity: {settings['similarity']}.",
        *(describe_embedder(name, card) for name, card in report["embedders"].items()),
        f"PSNR: {settings['psnr']}. SSIM: {settings['ssim']}.",
        f"In container: {settings['container']}.",
        f"Packed: {settings['packed']}.",
        *(
            f"{name}: rows' tables or decoders were fitted to it; the embedders before it are the "
            "judges"
            for name in report["fitted_to"]
        ),
        "Rates leave out the search for a quality, and reading and comparing.",
        *report["notes"],
        *(f"Missing: {name}: {why.rstrip('.')}." for name, why in report["missing"].items()),
    ]
    codebooks: dict[str, list[str]] = {}
    for row in report["rows"]:
        if row.get("codebook"):
            codebooks.setdefault(row["codebook"]["origin"], []).append(f"`{row['codec']}`")
    found += [
        f"Codebook or tables of {', '.join(rows)}: {origin}." for origin, rows in codebooks.items()
    ]
    formats = {row["series"]: row["settings"] for row in report["rows"] if "settings" in row}
    found += [f"{name}: {text}." for name, text in formats.items()]
    found.append(", ".join(f"{name} {v}" for name, v in report["versions"].items()) + ".")
    return found


def describe_embedder(name: str, card: dict[str, Any]) -> str:
    rule = f"; {card['rule']}" if card.get("rule") else ""
    weights = str(card.get("weights_id", "")).removeprefix("sha256:")[:12]
    return f"{name}: {card.get('dim')} dimensions{rule}; weights {weights or 'unknown'}."


def rate(value: float) -> str:
    """Patches a second; small ones with a digit more."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def interval(values: dict[str, Any], digits: int) -> str:
    low, high = values["ci95"] or (None, None)
    return bracketed(values["mean"], low, high, f".{digits}f")


def difference(values: dict[str, Any], digits: int) -> str:
    return bracketed(values["mean"], values["low"], values["high"], f"+.{digits}f")


def psnr(values: dict[str, Any]) -> str:
    """PSNR; infinite where all crops are equal, and how many were left out of the mean as such."""
    if values["n"] == 0:
        return "infinite (all equal)"
    left_out = f" ({values['equal']} equal left out)" if values["equal"] else ""
    return interval(values, 2) + left_out


def pick_crops(crops: Sequence[Crop]) -> list[int]:
    """Numbers of the crops to show: SHOWN of different slides, evenly spread."""
    firsts = sorted({crop.slide: n for n, crop in reversed(list(enumerate(crops)))}.values())
    places = np.linspace(0, len(firsts) - 1, min(SHOWN, len(firsts)))
    return [firsts[round(place)] for place in places.tolist()]


def crop_figures(
    report: dict[str, Any], originals: Sequence[np.ndarray], shown: Sequence[np.ndarray]
) -> list[str]:
    """HTML: a grid a crop, the original and what every codec makes of it, pixels as they are.

    originals  uint8 (H, W, 3), of the crops in report["contact"]
    shown      for every row of the report, uint8 (k, H, W, 3)
    """
    grids = []
    for place, (crop, original) in enumerate(zip(report["contact"], originals, strict=True)):
        source = report["crops"][crop]["source"].rpartition("/")[2]
        figures = [html_pages.figure(original, f"original, {source}")]
        for row, pictures in zip(report["rows"], shown, strict=True):
            figures.append(html_pages.figure(pictures[place], caption(row, crop)))
        grids.append(html_pages.grid(figures))
    return grids


def caption(row: dict[str, Any], crop: int) -> str:
    """Codec; bytes and the first embedder's similarity, or PSNR where there is none."""
    values = row["per_crop"]
    similarity = next(iter(values["similarity"].items()), None)
    if similarity:
        figure = f"{similarity[0]} {similarity[1][crop]:.3f}"
    else:
        psnr = values["psnr_db"][crop]
        figure = "equal" if psnr is None else f"{psnr:.1f} dB"
    return f"{row['codec']}, {values['bytes'][crop]:,} B, {figure}"


def draw_plot(report: dict[str, Any]) -> bytes:
    """PNG of rate against fidelity; PSNR where no embedder was asked for."""
    panels = [("similarity", name) for name in report["embedders"]] or [("psnr_db", "")]
    figure, axes = make_panels(len(panels), PANEL_IN)
    for axis, (column, name) in zip(axes, panels, strict=True):
        draw_panel(axis, report["rows"], column, name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return saved(figure, DPI)


def draw_panel(axis: Any, rows: list[dict[str, Any]], column: str, name: str) -> None:
    """Curves of codec families: means over crops, bars for the 95 % intervals."""
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["series"], []).append(row)
    for place, (label, members) in enumerate(series.items()):
        points = sorted(point for row in members if (point := point_of(row, column, name)))
        if not points:
            continue
        sizes, means, lows, highs = zip(*points, strict=True)
        kind = members[0]["kind"]
        axis.errorbar(
            sizes, means, yerr=(lows, highs), label=label,
            marker=MARKERS[kind], linestyle="-" if kind == "latent" else "--",
            color=f"C{place % 10}", markersize=5, linewidth=1.2, capsize=2, elinewidth=0.8,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("bytes a patch")
    axis.set_ylabel("PSNR, dB" if column == "psnr_db" else "cosine similarity")
    axis.set_title(name or "PSNR")
    axis.grid(alpha=0.3, which="both", linewidth=0.5)


def point_of(
    row: dict[str, Any], column: str, name: str
) -> tuple[float, float, float, float] | None:
    """Bytes, mean, and how far the interval reaches down and up; None where there is no mean."""
    group = row["groups"]["all"]
    values = group[column][name] if name else group[column]
    mean = values["mean"]
    if mean is None:
        return None
    low, high = values["ci95"] or (mean, mean)
    return group["bytes"], mean, max(0.0, mean - low), max(0.0, high - mean)
