"""latentds show: a page of decoded patches with their columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from latentds.core.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write one self-contained HTML page: decoded patches, their columns, label counts."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    out: Path
    """HTML file to write."""
    split: str | None = None
    """Split to show; the first by default."""
    count: int = 48
    """Patches, drawn by --seed."""
    seed: int = 0
    autoencoder: Annotated[str | None, tyro.conf.arg(aliases=["--decoder"])] = None
    """Name, folder or ORG/NAME of the decoder, where the recorded one is local or not wanted."""
    overwrite: bool = False
    """Replace --out where it is there."""


def run(config: Config) -> None:
    """Decode and write the page."""
    from latentds_tools.reports.commands import check_free

    from latentds.core.storage import write_atomically
    from latentds.errors import InputError

    check_free([config.out], config.overwrite)
    if config.count < 1:
        raise InputError(f"--count {config.count}; at least 1")
    write_atomically(config.out, make_page(config).encode())
    say(config.out)


def make_page(config: Config) -> str:
    """The page's HTML."""
    import numpy as np
    from latentds_tools.reports import html_pages

    from latentds.autoencoders.autoencoder import short
    from latentds.loading.loader import LatentLoader
    from latentds.store.manifest import read_manifest

    split = config.split or next(iter(read_manifest(config.folder).splits))
    loader = LatentLoader(
        config.folder, split, autoencoder=config.autoencoder, columns=("source", "source_encoding")
    )
    dataset = loader.dataset
    manifest = dataset.shards.manifest
    first, end = dataset.shards.patch_range(split)
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(np.arange(first, end), min(config.count, end - first), replace=False))
    figures = []
    for start in range(0, len(rows), 16):
        batch = loader.prepare(dataset.read(rows[start : start + 16]))
        figures += [patch_figure(batch, place, manifest.classes) for place in range(len(batch))]
    contract = manifest.contract
    facts = [
        ("patches", f"{manifest.patches:,}"),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in manifest.splits.items())),
        ("bytes a patch", f"{contract.bytes_per_patch:,}"),
        ("autoencoder", contract.autoencoder.get("name")),
        ("latent_id", short(contract.latent_id)),
        ("codebook", f"{contract.codebook.kind}, {contract.codebook.summary}"),
    ]
    sections = [html_pages.table(["", "data set"], facts)]
    if manifest.classes:
        sections += [
            html_pages.heading(f"Labels in {split}"),
            html_pages.bars(manifest.labels(split)),
        ]
    sections += [
        html_pages.heading(
            f"{len(figures)} decoded patches of {split}, drawn with seed {config.seed}"
        )
    ]
    sections += [html_pages.grid(figures)]
    lead = "Decoded from latents: detail is lost, and some is made up. Not for diagnosis."
    return html_pages.page(config.folder.resolve().name, lead, sections)


def patch_figure(batch: Any, place: int, classes: tuple[str, ...]) -> str:
    """One decoded patch with its columns."""
    from latentds_tools.reports import html_pages

    image = batch.images[place].mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    label, (x, y) = int(batch.labels[place]), batch.coords[place].tolist()
    parts = [
        classes[label] if label >= 0 else "",
        batch.slides[place] or "",
        f"x {x} y {y}" if (x, y) != (-1, -1) else "",
        batch.columns["source"][place],
        batch.columns["source_encoding"][place],
    ]
    return html_pages.figure(image, " · ".join(part for part in parts if part))
