"""latentds export: to Parquet, or a tree of npy files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import picked, show


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
    integers: bool = False
    """For npy, of entropy-coded records: write the int16 integers (C, h, w) that the records hold.
    table.csv then has the step that the integers count."""
    split: str | None = None
    """Split to write. By default all splits."""
    overwrite: bool = False
    """Replace an earlier export in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.edit import exporting
    from latentds.errors import InputError

    if (config.latents or config.integers) and config.to != "npy":
        raise InputError(f"--latents and --integers are for --to npy; {config.to} holds codes")
    if config.latents and config.integers:
        raise InputError("--latents and --integers are two things to write; pass one of them")
    where = (config.folder, config.out, config.split)
    if config.to == "parquet":
        count = exporting.export_parquet(*where, overwrite=config.overwrite)
    else:
        given = picked(config, "latents", "integers", "overwrite")
        count = exporting.export_npy(*where, **given)
    summary = {"out": str(config.out), "patches": count}
    show(summary, config.json, lambda _: f"{config.out}: {count:,} patches")
