"""latentds extract: decoded pictures in class folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import picked, show

from latentds.core.display import number_of
from latentds.core.storage import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Decode patches to picture files, [SPLIT/]LABEL/SLIDE/KEY.png, and write table.csv.

    A killed run is resumed by the same command, which does not decode existing pictures again.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder or location of a data set."""
    out: Path
    """Folder of pictures to be made."""
    format: Literal["png", "jpeg"] = "png"
    """File format."""
    quality: int = 95
    """Quality of JPEG files, 1 to 100."""
    split: str | None = None
    """Split to decode. By default all splits, each in a folder of its own."""
    where: str | None = None
    """Condition on label, slide, patient, x, y, mpp or size_px, such as "label == 'TUM'"."""
    slides: Path | None = None
    """Text file of the slides to take, one name a line."""
    autoencoder: Annotated[str | None, tyro.conf.arg(aliases=["--decoder"])] = None
    """Decoder to use where the recorded one is local or not wanted: name, folder or ORG/NAME."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    overwrite: bool = False
    """Replace the pictures of another extraction in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.core.processes import choose_device
    from latentds.edit.extracting import extract, read_slide_list

    check_ranges(config, quality=(1, 100))
    counts = extract(
        config.folder,
        config.out,
        picture_format=config.format,
        slides=read_slide_list(config.slides) if config.slides else None,
        device=choose_device(config.device),
        **picked(config, "quality", "split", "where", "autoencoder", "overwrite"),
    )
    summary = {"out": str(config.out), **counts}
    text = (
        f"{config.out}: {number_of(counts['written'], 'picture')} written, {counts['found']:,} "
        "there before"
    )
    show(summary, config.json, lambda _: text)
