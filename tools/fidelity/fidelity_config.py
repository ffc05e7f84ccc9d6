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
    """Codecs with commas between: jpeg:75 (a quality), avif@4096 (at most so many bytes each),
    avif~4096 (so many on average, at one quality for all), avif (at equal bytes with each
    autoencoder), avif444 (at its best), jpeg444, jpeg-fitted (quantization tables fitted on
    --fit-on to the last of --embedders), webp, jxl, j2k, png; autoencoders by name or folder, as
    they are (tiny) or quantized (tiny+kmeans, sd15+kmeans:16, +kmeans-channel, +int8-minmax,
    +int8-percentile, +int8-channel, +fp16), as additive codes of so many bytes a latent
    cell (tiny+sum:2) or entropy-coded records of so many bytes (tiny-v2+rans:4096, sd3+rans:8192);
    codes of latents refined by so many steps (tiny+kmeans+refine4). By default
    tiny+kmeans,jpeg,webp,avif,jxl. Rows of equal bytes are set beside AVIF's."""
    embedders: str | None = None
    """Embedders with commas between, as load_embedder has them; none by default. In tables, those
    that a row's decoder or tables were fitted to stand last."""
    preset: Literal["paper-table1"] | None = None
    """paper-table1: codecs, embedders and number of patches of the paper's Table 1, unless given
    here."""
    out: Path | None = None
    """Folder for fidelity.html, .md and .json, the plots and the contact sheet. Finished rows are
    kept there: the same command goes on where it was killed."""
    overwrite: bool = False
    """Replace a finished report in --out; rows that would be the same are not measured again."""
    crop_px: int = 256
    """Edge of the crops."""
    crops: int = 2
    """Crops a picture, drawn by --seed; a picture of just --crop-px is taken whole, once."""
    patches: int | None = None
    """Crops at most; pictures are drawn where there are more. 1000 by default."""
    seed: int = 0
    name_pattern: str | None = None
    """Regular expression with (?P<slide>...), searched in each path below its folder; for the
    folders with a path that it matches."""
    slides_table: tuple[Path, ...] = ()
    """CSV files with a column path, name or file and one of slide, tma_core or patient; each for
    the folders whose pictures it lists."""
    slides: Literal["auto", "folder", "picture"] = "auto"
    """What counts as a slide in the other folders: auto (a labels.csv in it that says so, else TCGA
    barcodes in all names, else folders that lie two deep, else each picture), the folder a picture
    lies in, or each picture."""
    fit_on: Path | None = None
    """Folder of other pictures that codebooks and tables are fitted on; by default the tested
    crops, which favours them."""
    fit_patches: int = 256
    """Crops at most that codebooks are fitted on."""
    codebook: Path | None = None
    """Codebook file, used for the rows of its latents, kind and levels."""
    recode: str | None = None
    """Codings with commas between, jpeg:80,j2k:38: every crop is tested again as cut from its
    picture coded so; tables tell them apart, as they do files of other codings."""
    nuclei: Path | None = None
    """Folder of images/ and masks/ that a small U-Net is trained on; it finds nuclei in what codecs
    make of the tested pictures, whose masks lie beside their folder in masks/. Reports Dice."""
    probe_on: Path | None = None
    """Folder of pictures in folders of their classes, of the tested ones' classes: linear probes of
    each embedder are fitted on these originals, without the slide that is tested. Reports the
    share of reconstructions whose class is told."""
    refit: bool = False
    """Fit tiny's codebook, too, instead of the one it ships."""
    ssim: Literal["gaussian", "uniform", "torchmetrics"] = "gaussian"
    """Settings of SSIM: gaussian (Wang et al. 2004), uniform (scikit-image's defaults), or
    torchmetrics' defaults."""
    bootstrap: int = 1000
    """Rounds of the bootstrap over slides, seeded by --seed; 0 for no intervals."""
    contact: str | None = None
    """Crops on the contact sheet, their numbers with commas between; by default 3 of different
    slides."""
    device: str = "auto"
    """Where networks run: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    skip_missing: bool = False
    """Go on without codecs and embedders that are not available, and list them."""
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
