"""latentds export: to Parquet, or a tree of npy files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import picked, show

from latentds.core.display import number_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a data set's codes in a format that other tools read.

    parquet has a row a patch, for `datasets`; npy has a file a patch and table.csv.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder or location of a data set."""
    out: Path
    """Folder to be made."""
    to: Literal["parquet", "npy"]
    """Format to write."""
    latents: bool = False
    """For npy: write float32 latents instead of codes."""
    split: str | None = None
    """Split to write. By default all splits."""
    overwrite: bool = False
    """Replace an earlier export in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.edit import exporting
    from latentds.errors import InputError

    if config.latents and config.to != "npy":
        raise InputError(f"--latents is for --to npy; {config.to} holds codes")
    where = (config.folder, config.out, config.split)
    if config.to == "parquet":
        count = exporting.export_parquet(*where, overwrite=config.overwrite)
    else:
        given = picked(config, "latents", "overwrite")
        count = exporting.export_npy(*where, **given)
    summary = {"out": str(config.out), "patches": count}
    show(summary, config.json, lambda _: f"{config.out}: {number_of(count, 'patch', 'patches')}")
