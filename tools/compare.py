"""latentds compare: tables and plots of evaluations on several sources of the same patches."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from latentds.core.display import say
from latentds.errors import InputError

PAGE, REPORT = "comparison.md", "comparison.json"
BARS, DIFFERENCES = "bars.png", "differences.png"
OUTPUTS = (REPORT, PAGE, BARS, DIFFERENCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare evaluations of originals, codecs and latents over the same folds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of abmil, classify_patches and sampath, each with a result.json; of any tasks,
    data sets, models, embedders and seeds."""
    out: Path | None = None
    """Folder for comparison.json, comparison.md, bars.png and differences.png."""
    reference: str | None = None
    """Source (or run folder) that others are set against; by default the originals."""
    metric: str | None = None
    """Score that tables lead with, such as balanced_accuracy; by default the runs' own choice."""
    over: Literal["folds", "groups"] = "folds"
    """What the bootstrap of differences draws: folds (seeds of a fold averaged; seeds where there
    is one fold), or groups (patients) of predictions.csv or, for segmentations, images.csv."""
    draws: int | None = None
    """Draws of the bootstrap; 10,000 over folds and 2,000 over groups by default, 0 for no
    intervals."""
    seed: int = 0
    """Of the bootstrap."""
    paper: Literal["auto", "table2", "table3", "none"] = "auto"
    """The paper's figures beside ours: where the data set's classes or name say that it is the
    paper's, of one of its tables only, or none."""
    overwrite: bool = False
    """Replace a comparison in --out."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run folder given")
        if self.draws is not None and self.draws < 0:
            raise InputError(f"--draws {self.draws}; 0 or more")


def run(config: Config) -> None:
    """Read, compare, write, print."""
    from latentds_tools.comparison.compare_page import write_page
    from latentds_tools.comparison.compare_report import make_report
    from latentds_tools.comparison.paper_tables import check_columns
    from latentds_tools.comparison.run_pairing import Bootstrap
    from latentds_tools.comparison.run_reading import make_families, read_runs

    check_free(config)
    families = make_families(read_runs(config.runs))
    check_columns(families, config.paper)
    report = make_report(
        families,
        reference=config.reference,
        metric=config.metric,
        paper=config.paper,
        bootstrap=Bootstrap(config.over, config.draws, config.seed),
    )
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    page = write_page(report)
    if config.out is not None:
        write_files(config.out, report, page, text)
    say(text if config.json else page, end="")


def check_free(config: Config) -> None:
    """InputError where a comparison is in --out; MissingExtraError where none could be drawn."""
    if config.out is None:
        return
    from latentds_tools.comparison.compare_plots import check_matplotlib

    check_matplotlib()
    there = [name for name in OUTPUTS if (config.out / name).exists()]
    if there and not config.overwrite:
        raise InputError(f"{config.out / there[0]}: is there; pass --overwrite to replace it")


def write_files(out: Path, report: dict[str, Any], page: str, text: str) -> None:
    """All files at once; those of an older comparison that this one has not are removed."""
    from latentds_tools.comparison.compare_plots import draw_bars, draw_differences

    from latentds.core.storage import write_together

    drawn = {BARS: draw_bars(report), DIFFERENCES: draw_differences(report)}
    files = {out / name: content for name, content in drawn.items() if content is not None}
    # The report comes last: where it is there, all are whole.
    write_together(files | {out / PAGE: page.encode(), out / REPORT: text.encode()})
    for name, content in drawn.items():
        if content is None:
            (out / name).unlink(missing_ok=True)
