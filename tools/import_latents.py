"""latentds import: a data set of latents that others made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from latentds_tools.reports.commands import picked, show
from latentds_tools.reports.set_lines import set_facts, set_lines

from latentds.core.storage import check_ranges
from latentds.quantizers.scalar_fit import KindName


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Make a data set of latents that other programs wrote to files.

    It reads PixCell and ZoomLDM trees, one .npy a patch in class folders (or as `latentds export`
    wrote them), and .npy, .npz or .safetensors of (N, C, h, w) with labels, slides, coords. The
    scale of the latents is recorded.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder or file of latents."""
    out: Path
    """Folder of the data set to be made."""
    autoencoder: str
    """Name or local folder of the autoencoder that made these latents."""
    layout: Literal["pixcell", "zoomldm", "npy", "arrays"] | None = None
    """Layout of the files. By default it is recognized by their names."""
    scale: float | None = None
    """Factor in latent = stored * scale + shift. Bytes need it; for floats the default is 1."""
    shift: float | None = None
    """Summand in latent = stored * scale + shift. Bytes need it; for floats the default is 0."""
    codebook: Path | None = None
    """Codebook file. Floats are quantized with it; bytes are taken as its codes, or its records."""
    quantizer: KindName = "kmeans"
    levels: int = 256
    """Levels of the fitted codebook, 2 to 256."""
    fit_patches: int = 1000
    """Patches that the codebook is fitted to, drawn by --seed."""
    patch_size: int | None = None
    """Edge of a patch in pixels. By default latent cells times the autoencoder's factor."""
    shape: tuple[int, int, int] | None = None
    """C h w of arrays whose rows are stored flat."""
    labels: bool = True
    """Take class folders, or the files' labels, as labels."""
    split_folders: bool = True
    """Take top folders named train, val, valid, validation and test as splits."""
    name_pattern: str | None = None
    """Regular expression that is searched in relative paths. Its groups among label, slide, x, y
    and mpp describe the patch."""
    mpp: float | None = None
    """Micrometres a pixel, recorded with every patch whose files tell none."""
    order: Literal["shuffle", "path"] = "shuffle"
    """Order on disk: shuffled by --seed, or by path."""
    pack_size: int = 256
    """Patches in a pack, which is stored as one record."""
    shard_mb: int = 256
    """Size of a shard in MB of codes."""
    seed: int = 0
    """Seed of the order and of the codebook's sample."""
    overwrite: bool = False
    """Replace a data set that lies in --out."""
    json: bool = False
    """Print JSON."""


def run(config: Config) -> None:
    from latentds.edit.importing import import_latents

    manifest = import_latents(
        config.source, config.out, config.autoencoder, options(config), config.overwrite
    )
    summary = {
        "out": str(config.out),
        "patches": manifest.patches,
        "splits": manifest.splits,
        "classes": manifest.labels(),
        "codes_shape": list(manifest.contract.codes_shape),
        "patch_px": list(manifest.contract.patch_px),
        "shards": len(manifest.shards),
    }
    more = {name: manifest.made[name] for name in ("imported", "codebook", "quantization")}
    show(summary | more, config.json,
         lambda _: set_lines(set_facts(config.out, manifest), "imported", more))  # fmt: skip


def options(config: Config) -> Any:
    """What the files do not say themselves."""
    from latentds.edit.layouts import ImportOptions

    check_ranges(
        config, levels=(2, 256), fit_patches=(1, 10**7), patch_size=(8, 8192),
        pack_size=(1, 65536), shard_mb=(1, 65536), seed=(0, 2**31),
        mpp=(0.01, 100), scale=(-1e6, 1e6), shift=(-1e6, 1e6),
    )  # fmt: skip
    of_listing = ("layout", "labels", "split_folders", "name_pattern", "mpp")
    of_codes = ("scale", "shift", "codebook", "quantizer", "levels", "fit_patches", "shape")
    return ImportOptions(
        patch_px=config.patch_size,
        shard_bytes=config.shard_mb * 1_000_000,
        **picked(config, *of_listing, *of_codes, "order", "pack_size", "seed"),
    )
