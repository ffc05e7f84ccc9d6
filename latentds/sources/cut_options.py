"""What decides how originals are found and cut into patches, in the same words everywhere."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from latentds.core.storage import check_ranges, check_regular, take_paths
from latentds.errors import InputError

MAGNIFICATION_MPP = 10.0  # mpp of 1x: 40x is 0.25, 20x 0.5, as TRIDENT and most others have it
MAX_PX = 89_478_485  # Pillow's own limit against decompression bombs
KEY_BYTES = 32
SHOWN_DIGITS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutOptions:
    """How patches are cut; a command's or recipe's settings inherit these flags."""

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {
        "slides": (
            *("magnification", "mpp_tolerance", "slides", "root", "tile_downsample", "assume_mpp"),
            *("tissue", "min_tissue", "edges"),
        )
    }
    panel = "pictures"

    patch_size: int | None = None
    """Edge of a patch in pixels. If pictures differ in size, pass --resize, --tile or --pad."""
    resize: bool = False
    """Scale every picture to the patch size (area and Lanczos), without keeping proportions."""
    tile: bool = False
    """Cut every picture into a grid of patches. Remainders at the right and bottom are dropped."""
    stride: int | None = None
    """Step of the grid of --tile in pixels. By default the patch size; smaller steps overlap."""
    pad: bool = False
    """Enlarge smaller pictures to the patch size by reflection at the right and bottom."""
    name_pattern: str | None = None
    """Regular expression that is searched in relative paths. Its groups among label, slide, x, y
    and mpp describe the patch."""
    kind: Literal["pictures", "slides", "tiles"] | None = None
    """Kind of a folder's files, where it is not recognized, or recognized wrongly."""
    mpp: float | None = None
    """Resolution in micrometres a pixel. Slides are cut at it (0.5 is 20x), by default at their own
    resolution. For pictures it is recorded with every patch."""
    magnification: float | None = None
    """Magnification that sets --mpp to 10 / magnification: 20 is --mpp 0.5, 40 is 0.25."""
    mpp_tolerance: float = 0.05
    """Share of --mpp by which a level of a slide may differ from it. The level's pixels are then
    taken as they are, and their true mpp is recorded. 0 resamples to exactly --mpp."""
    slides: Path | None = None
    """Folder of the slides to which the coordinates of a TRIDENT or CLAM job belong."""
    root: Path | None = None
    """Folder from which a table's paths start. By default the table's own folder."""
    splits: Path | None = None
    """CSV that assigns slides to splits, in place of split folders: columns slide or patient,
    split, and label if it is to set labels. CLAM's splits_0.csv is read, too."""
    only: Path | None = None
    """File of the sources to take, one a line as a manifest names them. All others are left out.
    Other lines that begin with # are passed over."""
    tile_downsample: float = 1.0
    """Pixels of level 0 a pixel of tiles named <column>_<row>: 2 for tiles of 20x from 40x."""
    assume_mpp: float | None = None
    """Micrometres a pixel of slides that record neither this nor a magnification, and of slides
    whose pixels are not square."""
    tissue: Literal["otsu", "clam", "dsmil", "none"] = "otsu"
    """Rule for tissue: saturation above Otsu's threshold (otsu) or above CLAM's (clam), patches
    with edges as DSMIL's tiler keeps them (dsmil), or everything (none)."""
    min_tissue: float = 0.25
    """Share of tissue that a patch of a slide must have."""
    edges: Literal["drop", "pad"] = "drop"
    """Patches that reach beyond a slide: drop leaves them out, pad fills them up with white."""
    max_px: int = MAX_PX
    """Largest picture, in pixels. The default is Pillow's limit against decompression bombs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceOptions(CutOptions):
    """All that a source is opened with: the input, how it is cut, what it says of its patches.

    raises  InputError for settings that cannot be, or files and folders that are not there
    """

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {"slides": ("regions", "label_from")}
    panel = "labels_and_splits"

    source: Path
    """The input."""
    labels: bool = True
    """Take the labels of class folders, records and tables of pictures. Labels in --splits and
    --slide-table are taken in any case."""
    split_folders: bool = True
    """Take top folders named train, val, valid, validation and test as splits."""
    masks: Path | None = None
    """Folder of masks, 8-bit PNG or TIFF, which are stored losslessly. A mask has the relative path
    of its picture, suffix aside, and the same size."""
    slide_table: Path | None = None
    """CSV, TSV or Parquet with facts about slides, which take precedence over files and folders.
    Its columns are slide (or patient) and any of mpp, label, patient, split."""
    split_patients: str | None = None
    """Divide the patients into splits of these shares: train=0.8,val=0.1,test=0.1."""
    patient_pattern: str | None = None
    """Regular expression that finds the patient in a slide's name, or in a picture's path where it
    has no slide. The patient is the group patient, else the first group, else the whole match; '.*'
    makes each slide a patient. Names of TCGA, CPTAC, GTEx and CAMELYON need no pattern."""
    regions: Path | None = None
    """Folder of annotated regions, from which alone patches are taken: SLIDE.geojson (QuPath,
    TRIDENT's contours) or SLIDE.png, a mask at any scale. A share --min-tissue of a patch must lie
    in regions."""
    label_from: Literal["regions"] | None = None
    """regions: label every patch with the class of --regions that has the largest share of it. A
    class is a QuPath classification, or a mask's value."""
    enlarge: bool = False
    """Allow patches that enlarge a slide by more than 5 %, although they show nothing new."""
    anonymize: Path | None = None
    """File of a secret key, which is made if it is missing. Slide and source names are stored as
    hashes under this key. Keep the file: with it, the same slide gets the same name again."""
    seed: int = 0
    """Seed of all random choices."""
    location: Annotated[str | None, tyro.conf.Suppress] = None
    """Where the input lies, if `source` is a copy whose slides are filled from there."""

    def __post_init__(self) -> None:
        take_paths(self)
        self.take_magnification()
        self.check_cutting()
        self.check_files()
        self.check_splits()
        check_ranges(
            self,
            **{"patch_size": (8, 8192), "stride": (1, 8192), "max_px": (64, 2**34)},
            **{"seed": (0, 2**31), "min_tissue": (0, 1), "mpp_tolerance": (0, 0.5)},
            **{"mpp": (0.01, 100), "assume_mpp": (0.01, 100)},  # micrometres a pixel
        )

    def take_magnification(self) -> None:
        """Turn --magnification into --mpp, by which a run is known; InputError where both are."""
        if self.magnification is None:
            return
        if self.mpp is not None:
            raise InputError(
                f"--mpp {self.mpp:g} and --magnification {self.magnification:g}: give one of them "
                f"(a magnification is --mpp {MAGNIFICATION_MPP:g} / magnification)"
            )
        check_ranges(self, magnification=(0.1, 1000))
        object.__setattr__(self, "mpp", MAGNIFICATION_MPP / self.magnification)
        object.__setattr__(self, "magnification", None)  # a copy with other settings has one, too

    def check_cutting(self) -> None:
        if self.resize + self.tile + self.pad > 1:
            raise InputError("choose one of --resize, --tile and --pad")
        if (self.resize or self.tile or self.pad) and self.patch_size is None:
            raise InputError("--resize, --tile and --pad need --patch-size PX")
        if self.stride is not None and not self.tile:
            raise InputError("--stride is the step of --tile; pass both")

    def check_files(self) -> None:
        if self.label_from is not None and self.regions is None:
            raise InputError(f"--label-from {self.label_from} needs --regions FOLDER; pass both")
        for name in ("masks", "slides", "root", "regions"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise InputError(f"--{name} {folder}: no such folder")
        for name in ("only", "splits", "slide_table"):
            file = getattr(self, name)
            if file is not None and not file.is_file():
                raise InputError(f"--{name.replace('_', '-')} {file}: no such file")

    def check_splits(self) -> None:
        """Refuse splits by two rules, and a pattern without its use."""
        if self.splits is not None and self.split_patients is not None:
            raise InputError("choose one of --splits and --split-patients")
        if self.splits is not None and self.slide_table is not None:
            raise InputError("choose one of --splits and --slide-table, which may have splits too")
        if self.patient_pattern is None:
            return
        if self.split_patients is None:
            raise InputError("--patient-pattern is for --split-patients; pass both")
        try:
            re.compile(self.patient_pattern)
        except re.error as error:
            raise InputError(
                f"--patient-pattern {self.patient_pattern!r} is no regular expression ({error})"
            ) from error

    @property
    def folder(self) -> Path:
        """Where the input's relative paths start: the input itself, or the folder of one file."""
        return self.source.parent if self.source.is_file() else self.source

    @property
    def hide(self) -> Callable[[str], str]:
        """What stands for a name under --anonymize's key, the name itself without one.

        Whatever orders or deals by names does so by these: the rank of a name among sorted ones, or
        the split it falls into, would tell it to whoever has a list of names.
        """
        return Anonymizer(self.anonymize) if self.anonymize else str

    def key_check(self) -> str | None:
        """Which key names are hidden with, None where they are not: a resumed run must have it."""
        return Anonymizer(self.anonymize).check if self.anonymize else None


class Anonymizer:
    """HMAC-SHA256 of names under a key that stays at home.

    A plain hash would not do: there are few barcodes, all of them can be tried.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
        check_regular(path, str(path))
        text = path.read_text().strip()
        if len(text) < KEY_BYTES:
            raise InputError(
                f"{path}: {len(text)} characters are no key; name a file that is not there yet, "
                "and one is made"
            )
        self.key = text.encode()

    @property
    def check(self) -> str:
        """What tells one key from another and nothing else of it."""
        return self("latentds: which key is this?")

    def __call__(self, name: str) -> str:
        """What stands for a name; the same name gets the same under the same key."""
        return hmac.new(self.key, name.encode(), hashlib.sha256).hexdigest()[:SHOWN_DIGITS]
