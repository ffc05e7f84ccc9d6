"""latentds repack: the same patches in other packs, order, splits or codes, slides left out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from latentds_tools.reports.commands import picked, show
from latentds_tools.reports.set_lines import set_facts, set_lines

from latentds.core.display import say
from latentds.core.storage import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write a data set anew in other packs, order or splits; the old folder stays as it is.

    Codes, columns and masks are copied. With --encoding and --bytes, or a --codebook, the stored
    latents are coded anew in fewer bytes a patch, without the pictures. The loss is printed and
    recorded.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    out: Path
    """Folder of the data set to be made."""
    pack_size: int = 256
    """Patches in a pack, which is stored as one record."""
    group_by: Literal["slide", "none"] = "none"
    """slide: store all patches of a slide as one pack."""
    order: Literal["shuffle", "path", "stored"] = "shuffle"
    """Order on disk: shuffled by --seed, by source path, or as it was."""
    seed: int = 0
    """Seed of the order."""
    exclude_slides: Path | None = None
    """Text file of the slides to leave out, one name a line."""
    splits: Path | None = None
    """CSV that assigns slides to splits, in place of the old ones, as 'latentds convert --splits'
    reads it: columns slide or patient, and split; or CLAM's splits_0.csv."""
    shard_mb: int = 256
    """Size of a shard in MB of codes."""
    encoding: Literal["u8-sum", "rans"] | None = None
    """Kind of new codes. u8-sum: additive codebooks fitted to the set's own latents. rans:
    entropy-coded records, with a coarser step where the set has records already."""
    bytes: int | None = None
    """Bytes a patch of the new codes: for u8-sum a multiple of the latent cells, for rans any."""
    codebook: Path | None = None
    """Codebook file for the new codes, as 'latentds fit-codebook --kind additive' makes it."""
    autoencoder: str | None = None
    """Local folder of the set's autoencoder, for new codes, where it has no known name. Golden
    patches are decoded anew."""
    overwrite: bool = False
    """Replace a data set that lies in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.edit.repacking import repack
    from latentds.store.golden import read_golden_table
    from latentds.store.manifest import read_manifest

    before = read_manifest(config.folder).patches
    manifest = repack(config.folder, config.out, options(config), config.overwrite)
    kept = len(read_golden_table(config.out))
    if not kept:
        say("no golden patch is left: 'latentds verify' cannot check a decoder", file=sys.stderr)
    summary = {
        "out": str(config.out),
        "dataset_id": manifest.dataset_id,
        "patches": manifest.patches,
        "left_out": before - manifest.patches,
        "splits": manifest.splits,
        "packs": manifest.packs,
        "shards": len(manifest.shards),
        "golden": kept,
    }
    more: dict[str, Any] = {}
    if config.encoding or config.codebook:
        more = manifest.made["repacked"][-1]["recoded"] | {"codebook": manifest.made["codebook"]}
    done = f"of {before:,}"
    show(summary | more, config.json,
         lambda _: set_lines(set_facts(config.out, manifest), done, more))  # fmt: skip


def options(config: Config) -> Any:
    """What is to be different, lists read."""
    from latentds.edit.extracting import read_slide_list
    from latentds.edit.repacking import Repacking
    from latentds.sources.picture_tables import read_slide_table

    check_ranges(
        config, pack_size=(1, 65536), shard_mb=(1, 65536), seed=(0, 2**31), bytes=(16, 1 << 20)
    )
    return Repacking(
        exclude_slides=read_slide_list(config.exclude_slides) if config.exclude_slides else (),
        splits=read_slide_table(config.splits, use_labels=False) if config.splits else None,
        shard_bytes=config.shard_mb * 1_000_000,
        recoding=recoding(config),
        **picked(config, "pack_size", "group_by", "order", "seed"),
    )


def recoding(config: Config) -> Any:
    """What the patches are to be coded as; None where their codes stay."""
    from latentds.edit.recoding import Recoding
    from latentds.errors import InputError

    given = [config.encoding, config.bytes, config.codebook]
    if given == [None] * 3:
        if config.autoencoder is not None:
            raise InputError("--autoencoder is for other codes: pass --encoding and --bytes too")
        return None
    return Recoding(
        encoding=config.encoding,
        patch_bytes=config.bytes,
        codebook=config.codebook,
        autoencoder=config.autoencoder,
    )
