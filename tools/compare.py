"""latentds compare: tables and a plot of evaluations on several sources of the same patches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import check_free, check_least, deliver

from latentds.errors import InputError

DIFFERENCES = "differences.png"
OUTPUTS = ("comparison.json", "comparison.md", "comparison.html", DIFFERENCES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Compare evaluations of originals, codecs and latents over the same folds."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders of abmil, classify_patches and sampath, each with a result.json. They may differ
    in task, data set, model, embedder and seed."""
    out: Path | None = None
    """Folder for comparison.html, .md and .json, and differences.png."""
    reference: str | None = None
    """Source, or run folder, to compare with. By default the originals, else the first run."""
    metric: str | None = None
    """Score that comes first in tables, such as balanced_accuracy. By default the runs' own."""
    over: Literal["folds", "groups"] = "folds"
    """What the bootstrap of differences draws: folds, with their seeds averaged (seeds where there
    is one fold), or groups: patients of predictions.csv or, for segmentations, images.csv."""
    draws: int | None = None
    """Draws of the bootstrap, 0 for none. By default 10,000 over folds, 2,000 over groups."""
    seed: int = 0
    """Seed of the bootstrap."""
    paper: Literal["auto", "table2", "table3", "none"] = "auto"
    """Figures of the paper beside the runs: where the data set's classes or name say that it is the
    paper's (auto), of one of its tables only, or none."""
    overwrite: bool = False
    """Replace a comparison in --out."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("no run folder given")
        check_least(self, draws=0)


def run(config: Config) -> None:
    from latentds_tools.comparison.compare_page import draw_differences, write_page
    from latentds_tools.comparison.compare_report import make_report
    from latentds_tools.comparison.run_pairing import Bootstrap, make_families, read_runs

    if config.out is not None:
        check_free([config.out / name for name in OUTPUTS], config.overwrite)
    families = make_families(read_runs(config.runs))
    report = make_report(
        families,
        reference=config.reference,
        metric=config.metric,
        paper=config.paper,
        bootstrap=Bootstrap(config.over, config.draws, config.seed),
    )
    pictures = {DIFFERENCES: draw_differences(report)} if config.out is not None else {}
    deliver(report, write_page(report), "comparison", config.out, pictures, as_json=config.json)
