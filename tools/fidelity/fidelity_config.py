"""What can be asked of `latentds bench fidelity`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
from latentds_tools.reports.commands import check_least, listed

from latentds.errors import InputError

DEFAULT_CODECS = "tiny+kmeans,jpeg,webp,avif,jxl"
DEFAULT_PATCHES = 1000
MIN_CROP_PX = 16  # SSIM's window has 11


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Measure bytes, embedding similarity, PSNR, SSIM and rates of codecs on crops of pictures."""

    source: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of 8-bit pictures."""
    codecs: str | None = None
    """Comma-separated codecs, by default tiny+kmeans,jpeg,webp,avif,jxl. Picture formats: jpeg:75
    (a quality), avif@4096 (at most so many bytes each), avif~4096 (so many on average, at one
    quality for all), avif (at equal bytes with each autoencoder), avif444 (at its best), jpeg444,
    jpeg-fitted (quantization tables fitted on --fit-on to the last of --embedders), webp, jxl, j2k,
    png. Autoencoders, by name or folder: unquantized (tiny), quantized (tiny+kmeans,
    sd15+kmeans:16, +kmeans-channel, +int8-minmax, +int8-percentile, +int8-channel, +fp16), as
    additive codes of so many bytes a latent cell (tiny+sum:2), as entropy-coded records of so many
    bytes (tiny-v2+rans:4096, sd3+rans:8192), or refined by so many steps (tiny+kmeans+refine4).
    Rows of equal bytes are compared with AVIF's."""
    embedders: str | None = None
    """Comma-separated embedders, as load_embedder has them; by default none. Tables show those last
    to which a row's decoder or tables were fitted."""
    preset: Literal["paper-table1"] | None = None
    """paper-table1: the paper's codecs, embedders and number of patches, where not given here."""
    out: Path | None = None
    """Folder for fidelity.html, .md and .json, and the plot. It keeps finished rows, so the same
    command resumes a killed run."""
    overwrite: bool = False
    """Replace a finished report in --out. Rows that would be the same are not measured again."""
    crop_px: int = 256
    """Edge of the crops."""
    crops: int = 2
    """Crops a picture, drawn by --seed. A picture of just --crop-px is taken whole, once."""
    patches: int | None = None
    """Crops at most, by default 1000. Pictures are drawn if there are more."""
    seed: int = 0
    """Seed of the crops and pictures."""
    slides: Literal["auto", "folder", "picture"] = "auto"
    """What counts as a slide: the folder that a picture lies in (folder), or each picture
    (picture). auto takes the folder's labels.csv that lists all pictures (a column path, name or
    file, and one of slide, tma_core or patient), else TCGA barcodes in all names, else folders that
    lie two deep, else each picture."""
    fit_on: Path | None = None
    """Folder of other pictures to fit codebooks and tables on. By default the tested crops, which
    favours fitted codecs."""
    fit_patches: int = 256
    """Crops to fit codebooks on, at most."""
    recode: str | None = None
    """Comma-separated codings such as jpeg:80,j2k:38. Every crop is tested again as cut from its
    picture in this coding. Tables keep these rows apart, as they do files of other codings."""
    nuclei: Path | None = None
    """Folder of images/ and masks/ to train a small U-Net on. It then finds nuclei in the coded
    pictures, whose masks lie beside their folder in masks/. Reports Dice."""
    probe_on: Path | None = None
    """Folder of pictures in class folders, with the classes of the tested pictures. Linear probes
    of each embedder are fitted on these originals, without the slide that is tested. Reports the
    share of coded pictures whose class is recognized."""
    bootstrap: int = 1000
    """Rounds of the bootstrap over slides, seeded by --seed; 0 for no intervals."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    skip_missing: bool = False
    """Skip codecs and embedders that are not available, and list them."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        check_least(self, crop_px=MIN_CROP_PX, crops=1, fit_patches=1, patches=1, bootstrap=0)
        if self.probe_on is not None and not self.embedder_names():
            raise InputError("--probe-on: no --embedders to probe")
        if not self.source:
            raise InputError("no folder of pictures given")

    def filled(self) -> Config:
        """With the preset's and the default values where none are given."""
        codecs, embedders, patches = DEFAULT_CODECS, "", DEFAULT_PATCHES
        if self.preset:
            from latentds_tools.fidelity.paper_rows import paper_rows
            from latentds_tools.reports.paper_tables import paper_tables

            table = paper_tables("fidelity")
            codecs = ",".join(row.codec for row in paper_rows())
            embedders, patches = ",".join(table["embedders"]), table["settings"]["patches"]
        return dataclasses.replace(
            self,
            codecs=codecs if self.codecs is None else self.codecs,
            embedders=embedders if self.embedders is None else self.embedders,
            patches=patches if self.patches is None else self.patches,
        )

    def embedder_names(self) -> list[str]:
        return listed(self.embedders)
