"""latentds export: to Parquet, a tree of npy files, or an index for wids."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import picked, show


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a data set's codes as other tools read them.

    parquet: a row a patch, for `datasets`; npy: a file a patch and table.csv; wids: an index over
    the shards as they are, for webdataset's ShardListDataset.
    """

    folder: Annotated[str, tyro.conf.Positional]
    """Folder or location of a data set."""
    out: Path
    """Folder to be made; of wids, the JSON file."""
    to: Literal["parquet", "npy", "wids"]
    """What to write."""
    latents: bool = False
    """npy: float32 latents instead of codes."""
    integers: bool = False
    """npy, of entropy-coded records: the int16 integers (C, h, w) they hold, instead of the records
    as stored; table.csv then tells the step they count in."""
    split: str | None = None
    """One split; all by default."""
    overwrite: bool = False
    """Replace what an earlier export wrote there."""
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
    elif config.to == "npy":
        given = picked(config, "latents", "integers", "overwrite")
        count = exporting.export_npy(*where, **given)
    else:
        count = exporting.export_wids(*where, overwrite=config.overwrite)
    unit = "packs" if config.to == "wids" else "patches"
    summary = {"out": str(config.out), unit: count}
    show(summary, config.json, lambda _: f"{config.out}: {count:,} {unit}")
