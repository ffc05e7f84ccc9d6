"""Tables of pages that follow from kept figures, each made anew from its source.

    python -m latentds_tools.reports.traced            # writes them into the pages
    python -m latentds_tools.reports.traced --check    # names those that differ

Nothing is measured here. docs/traceability.md says where the sources themselves come from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentds_tools.bench import bench_loader, bench_resume
from latentds_tools.fidelity import fidelity_page
from latentds_tools.fidelity.front import cell, cost_table, read_rows
from latentds_tools.reports.markdown import table

from latentds.core.display import say
from latentds.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
EMBEDDERS = ("efficientnet-lite0", "nic:encoder_multitask-4", "nic:encoder_bigan")
MEASURES = ("bytes", *EMBEDDERS, "PSNR, dB", "SSIM")
# Section of docs/fidelity.md: what its first row is called; the codecs of each.
KEPT = {"MoNuSeg": "MoNuSeg, 28 crops: ", "UCSB": "UCSB, 40 crops: "}
KEPT_CODECS = (
    "tiny-v2+rans:4096", "tiny-v2-fast+rans:4096", "tiny-v2-cpu+rans:4096", "tiny+kmeans",
    "avif444@4096", "avif@4096", "jxl@4096", "tiny-v2+rans:2048", "tiny-v2-fast+rans:2048",
    "tiny-v2-cpu+rans:2048", "avif444@2048", "avif@2048", "jxl@2048",
)  # fmt: skip
REFERENCES = ("avif444@1024", "avif444@2048", "avif444@4096", "avif444@8192")
# AVIF at its best and 8,192 bytes was measured later than the other rows, by itself.
LATER = {("monuseg", "avif444@8192"): "monuseg-8192"}
UNTRAINED = "timm:tf_efficientnet_lite0"  # what reports call it, whatever file its weights are of
SHUFFLED = "-shuffled"  # what a folder is called whose pictures were dealt to classes by chance
DOWNSTREAM = (  # a report's name, its table's, and the score shown
    ("patches-ucsb", "UCSB breast", "accuracy"),
    ("patches-oral", "oral mucosa", "accuracy"),
    ("slides-ucsb", "UCSB breast as bags", "auc"),
)
CALLED = {"tiny+kmeans": "`tiny-v1`", "jxl": "JPEG XL"}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A table of a page.

    page, source  paths from the repository's root
    start         how the table's first line begins
    make          Markdown of the table, from the source's path
    """

    page: str
    start: str
    source: str
    make: Callable[[Path], str]


def main(words: Sequence[str]) -> int:
    """Write the tables into their pages, or with --check say which differ; the exit code."""
    differ = 0
    for traced in TABLES:
        page = ROOT / traced.page
        text, made = page.read_text(), traced.make(ROOT / traced.source)
        old = table_in(text, traced.start, traced.page)
        if old == made:
            continue
        differ += 1
        say(f"{traced.page}: the table '{traced.start}' is not what {traced.source} gives")
        if "--check" not in words:
            page.write_text(text.replace(old, made))
    return int(differ > 0 and "--check" in words)


def table_in(text: str, start: str, page: str) -> str:
    """The table whose first line starts so; InputError unless there is one."""
    lines = text.split("\n")
    places = [number for number, line in enumerate(lines) if line.startswith(start)]
    if len(places) != 1:
        raise InputError(f"{page}: {len(places)} lines start with {start!r}; one is needed")
    rest = lines[places[0] :]
    length = next((n for n, line in enumerate(rest) if not line.startswith("|")), len(rest))
    return "\n".join(rest[:length])


def kept_rows(source: Path) -> str:
    lines = []
    for section, first in KEPT.items():
        rows = read_rows(source, section)
        for number, codec in enumerate(KEPT_CODECS):
            figures = [cell(rows, codec, measure).split(" ")[0] for measure in MEASURES]
            lines.append([("" if number else first) + called(codec), *figures])
    header = ["", "bytes", "EfficientNet-Lite0", "nic multitask-4", "nic bigan", "PSNR, dB", "SSIM"]
    return table(header, lines)


def called(codec: str) -> str:
    """A codec's name on the page of autoencoders."""
    name = codec.split("@")[0].split("+rans")[0]
    return CALLED.get(codec, CALLED.get(name, f"`{name}`"))


def bench_table(as_text: Callable[[Any], str], start: str, source: Path) -> str:
    return table_in(as_text(json.loads(source.read_text())), start, str(source))


def equal_bytes(title: str, part: Callable[[dict[str, Any]], str], source: Path) -> str:
    """A table of a fidelity report, under the name of its pictures."""
    found = table_in(part(json.loads(source.read_text())), "| codec |", str(source))
    found = found.replace(UNTRAINED, "random weights")
    return found.replace("| codec |", f"| {title} |", 1)


def fidelity_tables() -> Iterator[Traced]:
    """What docs/fidelity.md has of the runs at equal bytes, and of the null."""
    whole = functools.partial(fidelity_page.main_table, group="all")
    parts: list[tuple[str, Callable[[dict[str, Any]], str], str]] = []
    for name, run in (("MoNuSeg", "monuseg"), ("UCSB", "ucsb")):
        parts += [(name, whole, run), (f"{name}, steps", fidelity_page.steps_part, run)]
        for reference in REFERENCES:
            less = functools.partial(fidelity_page.differences_part, reference=reference)
            parts.append((f"{name}, less `{reference}`", less, LATER.get((run, reference), run)))
    parts.append(("MoNuSeg, null", whole, "null"))
    for title, part, run in parts:
        make = functools.partial(equal_bytes, title, part)
        yield Traced("docs/fidelity.md", f"| {title} |", f"results/fidelity-{run}.json", make)


def downstream_table(title: str, score: str, source: Path) -> str:
    """Scores of a comparison: a source a row, an embedder a column, nulls beside them."""
    families = json.loads(source.read_text())["families"]
    whole = [f for f in families if not f["data"].endswith(SHUFFLED)]
    by_chance = {f["embedder"]: f["rows"][0] for f in families if f["data"].endswith(SHUFFLED)}
    embedders = [family["embedder"] for family in whole]
    lines = []
    for rows in zip(*(family["rows"] for family in whole), strict=True):
        first = rows[0]
        figures = [in_per_cent(row, score) for row in rows]
        lines.append([f"`{first['source']}`", f"{first['kilobytes']:.1f}", *figures])
    lines.append(
        ["labels shuffled", "", *(in_per_cent(by_chance[name], score) for name in embedders)]
    )
    return table([title, "KB", *embedders], lines).replace(UNTRAINED, "random weights")


def in_per_cent(row: dict[str, Any], score: str) -> str:
    """A score over folds, behind it the paired difference with its interval."""
    over_folds, difference = row["scores"][score], row["difference"]
    found = f"{100 * over_folds['mean']:.1f} ± {100 * over_folds['sd']:.1f}"
    if difference is None:
        return found
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{found} ({mean:+.1f} [{low:+.1f}, {high:+.1f}])"


TABLES = (
    *fidelity_tables(),
    *(
        Traced(
            "docs/downstream.md",
            f"| {title} |",
            f"results/{name}.json",
            functools.partial(downstream_table, title, score),
        )
        for name, title, score in DOWNSTREAM
    ),
    Traced(
        "README.md",
        "| stored as |",
        "docs/fidelity.md",
        lambda source: cost_table(read_rows(source)),
    ),
    Traced("docs/autoencoders.md", "|  | bytes | EfficientNet", "docs/fidelity.md", kept_rows),
    *(
        Traced(
            f"docs/{page}.md",
            start,
            f"results/{name}.json",
            functools.partial(bench_table, as_text, start),
        )
        for page, start, name, as_text in (
            ("reliability", "| loader | ranks", "resume", bench_resume.as_text),
            ("benchmarks", "| batches of | loader | order", "loaders", bench_loader.as_text),
        )
    ),
)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
