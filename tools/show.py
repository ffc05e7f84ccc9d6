"""latentds show: a page of decoded patches with their columns, or of slides."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Annotated, Any

import tyro

from latentds.core.display import say


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Write one self-contained HTML page of decoded patches, their columns and label counts.

    With --slides the page shows every slide: what was taken, why the rest was not, and some
    patches.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set."""
    out: Path
    """HTML file to write."""
    slides: bool = False
    """Show every slide, sorted and searchable, with links to its decoded patches."""
    split: str | None = None
    """Split to show. By default train, or the first; with --slides all."""
    count: int = 48
    """Patches, drawn by --seed. With --slides they are spread over the slides."""
    seed: int = 0
    """Seed of the patches that are shown."""
    originals: Path | None = None
    """Input that the set was converted from. Its pixels are shown beside the decoded ones."""
    slide_folder: Path | None = None
    """Folder of the slides, where --originals is a TRIDENT or CLAM job."""
    root: Path | None = None
    """Folder from which paths start, where --originals is a table."""
    anonymize: Path | None = None
    """Key file of --anonymize, for --originals of a set whose names are hashes."""
    autoencoder: Annotated[str | None, tyro.conf.arg(aliases=["--decoder"])] = None
    """Decoder to use where the recorded one is local or not wanted: name, folder or ORG/NAME."""
    overwrite: bool = False
    """Replace an existing file --out."""


def run(config: Config) -> None:
    from latentds_tools.reports.commands import check_free, check_least

    from latentds.core.storage import write_atomically
    from latentds.errors import InputError

    check_free([config.out], config.overwrite)
    check_least(config, count=1)
    if config.originals is None and (config.slide_folder or config.root or config.anonymize):
        raise InputError("--slide-folder, --root and --anonymize are of --originals; pass it too")
    page = make_slide_page(config) if config.slides else make_page(config)
    write_atomically(config.out, page.encode())
    say(config.out)


class ShownPatches:
    """Decoded patches of a split as figures, beside their originals where those are given."""

    def __init__(self, config: Config, split: str) -> None:
        from latentds.loading.loader import LatentLoader
        from latentds.sources.originals import Originals

        self.loader = LatentLoader(
            config.folder,
            split,
            autoencoder=config.autoencoder,
            columns=("source", "source_encoding"),
        )
        self.shards = self.loader.dataset.shards
        self.originals = None
        if config.originals is not None:
            self.originals = Originals(
                self.shards, config.originals, slides=config.slide_folder, root=config.root,
                anonymize=config.anonymize,
            )  # fmt: skip
        self.figure_px = 200 if self.originals is None else 380

    def figures(self, rows: Any) -> list[tuple[str, str]]:
        """Slide ("" for none) and HTML of the patches at rows."""
        from latentds.codecs.latent import to_pictures

        made = []
        for start in range(0, len(rows), 16):
            batch = self.loader.prepare(self.loader.dataset.read(rows[start : start + 16]))
            originals: Any = itertools.repeat(None)
            if self.originals is not None:
                coords = batch.coords.cpu().numpy()
                originals = self.originals.read(batch.columns["source"], coords)
            pairs = zip(to_pictures(batch.images), originals, strict=False)
            for place, (image, original) in enumerate(pairs):
                caption = caption_of(batch, place, self.shards.manifest.classes)
                made.append((batch.slides[place] or "", patch_figure(image, caption, original)))
        return made


def make_page(config: Config) -> str:
    import numpy as np
    from latentds_tools.reports import html_pages

    from latentds.autoencoders.autoencoder import short
    from latentds.store.format import main_split
    from latentds.store.manifest import read_manifest

    split = config.split or main_split(read_manifest(config.folder).splits)
    patches = ShownPatches(config, split)
    manifest = patches.shards.manifest
    first, end = patches.shards.patch_range(split)
    rng = np.random.default_rng(config.seed)
    rows = np.sort(rng.choice(np.arange(first, end), min(config.count, end - first), replace=False))
    figures = [figure for _, figure in patches.figures(rows)]
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
        sections.append(html_pages.heading(f"Labels in {split}"))
        counts = ((label, f"{count:,}") for label, count in manifest.labels(split).items())
        sections.append(html_pages.table(["label", "patches"], counts))
    drawn = f"{len(figures)} decoded patches of {split}, drawn with seed {config.seed}"
    sections += [html_pages.heading(drawn), html_pages.grid(figures, patches.figure_px)]
    lead = "Decoded from latents: detail is lost, and some is made up. Not for diagnosis."
    return html_pages.page(config.folder.resolve().name, lead, sections)


def make_slide_page(config: Config) -> str:
    from latentds_tools.reports.commands import check_known
    from latentds_tools.reports.slide_pages import slide_page

    from latentds.store.manifest import read_manifest
    from latentds.store.slide_records import need_slide_records

    splits = list(read_manifest(config.folder).splits)
    records = need_slide_records(config.folder)
    if config.split is not None:
        check_known("split", [config.split], splits)
        splits = [config.split]
    figures: dict[str, list[str]] = {}
    split_of: dict[str, str] = {}
    for number, split in enumerate(splits):
        share = len(range(number, config.count, len(splits)))  # --count dealt over the splits
        patches = ShownPatches(config, split)
        split_of |= dict.fromkeys(slides_of(patches.shards, split), split)
        for slide, figure in patches.figures(dealt_rows(patches.shards, split, share, config.seed)):
            figures.setdefault(slide, []).append(figure)
    # A set may have been divided anew since its slides were looked at.
    records = [dataclasses.replace(one, split=split_of.get(one.name, one.split)) for one in records]
    if config.split is not None:
        records = [record for record in records if record.split == config.split]
    return slide_page(config.folder.resolve().name, records, figures, patches.figure_px)


def slides_of(shards: Any, split: str) -> list[str]:
    import numpy as np

    slides = np.unique(shards.patches["slide"][slice(*shards.patch_range(split))])
    return [shards.manifest.slides[number] for number in slides.tolist() if number >= 0]


def dealt_rows(shards: Any, split: str, count: int, seed: int) -> Any:
    """Rows of `count` patches of a split, drawn by `seed`: one of every slide, then one more."""
    import numpy as np

    first, end = shards.patch_range(split)
    rows = np.random.default_rng(seed).permutation(np.arange(first, end))
    slides = shards.patches["slide"][rows]
    order = np.argsort(slides, kind="stable")
    starts = np.flatnonzero(np.diff(slides[order], prepend=slides[order][:1] - 1))
    turns = np.empty(len(rows), np.int64)
    turns[order] = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    return np.sort(rows[np.argsort(turns, kind="stable")[:count]])


def caption_of(batch: Any, place: int, classes: tuple[str, ...]) -> str:
    label, (x, y) = int(batch.labels[place]), batch.coords[place].tolist()
    parts = [
        classes[label] if label >= 0 else "",
        batch.slides[place] or "",
        f"x {x} y {y}" if (x, y) != (-1, -1) else "",
        batch.columns["source"][place],
        batch.columns["source_encoding"][place],
    ]
    return " · ".join(part for part in parts if part)


def patch_figure(image: Any, caption: str, original: Any | None) -> str:
    """One decoded patch, beside its original where that is given."""
    from latentds_tools.reports import html_pages

    from latentds.store.golden import psnr_db

    if original is None:
        return html_pages.figure(image, caption)
    decoded = f"decoded, {psnr_db(original, image):.1f} dB · {caption}"
    return html_pages.figure_row([
        html_pages.figure(original, "source"), html_pages.figure(image, decoded)
    ])  # fmt: skip
