"""Settings of a conversion. No heavy import: `latentds convert --help` is built from this."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from latentds.errors import InputError
from latentds.quantizers.scalar_kinds import KindName

# What may differ between a run and its resumption: it changes no byte of the result.
# The autoencoder may be a path; the contract names it.
PAPER = {"patch_size": 256, "mpp": 0.5, "tissue": "dsmil"}
NOT_RECORDED = (
    "autoencoder",
    "source",
    "slides",
    "root",
    "splits",
    "slide_table",
    "kind",  # these three told where given: plans of before them are compared with
    "enlarge",
    "patient_pattern",
    "only",
    "anonymize",
    "out",
    "masks",
    "codebook",
    "device",
    "workers",
    "max_bad",
    "bytes",  # told by hand, as codebook and refine are
    "refine",
    "overwrite",
    "engine",
    "address",
    "ray_workers",
    "gpus_per_worker",
    "cpus_per_worker",
)


CODEBOOK_KINDS = ("scalar", "additive", "rans")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a folder of pictures into a latentds data set.

    Class folders become labels, train/val/test folders splits. A killed run is resumed by the same
    command.
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of 8-bit pictures, slides or archives of them (tar, Parquet), a table of paths, a data
    set saved by Hugging Face's save_to_disk, hf://datasets/ORG/NAME[@REVISION], or a location such
    as s3://bucket/slides, which is copied to --work first."""
    out: Path
    """Folder of the data set to be made, or a location such as s3://bucket/brca: then it is made in
    a local folder first, and uploaded."""
    autoencoder: str = "tiny-v2"
    """tiny-v2, tiny-v2-fast, tiny-v1, sd15, sd3, dcae-f32, dcae-f32-mix, taesd, taesd3, sd15-path,
    sd3-path, dcae-f32-path; or a local folder of weights."""
    quantizer: KindName = "kmeans"
    levels: int = 256
    """Levels of the codebook, 2 to 256."""
    codebook: Path | None = None
    """Kind of codes: scalar (a byte a latent value), additive (sums of vectors, whose bytes --bytes
    chooses), rans (entropy-coded records of --bytes); or a file made by 'latentds fit-codebook'. By
    default what ships with the autoencoder, else scalar, or additive where --bytes is given."""
    bytes: int | None = None
    """Bytes a patch: of rans any number, of additive codes a multiple of the latent cells, of which
    a patch of 256 px has 1,024 at f8."""
    refine: int = 0
    """Gradient steps on the latents of every patch, through the decoder, before they are coded:
    codes that keep more in the same bytes, for a step's time of some three decodings each. 4 bring
    most of it."""
    fit_patches: int = 1000
    """Patches the codebook is fitted to, drawn by --seed."""
    patch_size: int | None = None
    """Edge of a patch in pixels; with --resize, --tile or --pad where pictures differ."""
    resize: bool = False
    """Scale every picture to the patch size (area and Lanczos, proportions not kept)."""
    tile: bool = False
    """Cut every picture into a grid of patches; remainders at the right and bottom are dropped."""
    stride: int | None = None
    """Step of the tiles' grid in pixels; the patch size by default, smaller for overlap."""
    pad: bool = False
    """Reflect smaller pictures at the right and bottom up to the patch size."""
    masks: Path | None = None
    """Mask folder: 8-bit PNG or TIFF, same relative path and size, suffix aside; kept lossless."""
    labels: bool = True
    """Take class folders as labels."""
    split_folders: bool = True
    """Take top folders named train, val, valid, validation and test as splits."""
    name_pattern: str | None = None
    """Regular expression with groups among label, slide, x, y, mpp, searched in relative paths."""
    mpp: float | None = None
    """Micrometres a pixel: of pictures, recorded with every patch; of slides, what patches are to
    have (0.5 is 20x), their own where not given."""
    slides: Path | None = None
    """Folder of the slides that a TRIDENT or CLAM job's coordinates belong to."""
    root: Path | None = None
    """Folder that a table's paths start from; the table's own by default."""
    splits: Path | None = None
    """CSV with columns slide or patient, split, and label if it is to set labels: splits of the
    slides, instead of split folders; or CLAM's splits_0.csv."""
    slide_table: Path | None = None
    """CSV, TSV or Parquet with a column slide (or patient) and any of mpp, label, patient, split:
    what it says of a slide counts more than its file and folders."""
    kind: Literal["pictures", "slides", "tiles"] | None = None
    """What a folder's files are, where a look at all of them does not tell, or tells wrong."""
    only: Path | None = None
    """File of sources, one a line as the manifest names them: convert these and no others."""
    split_patients: str | None = None
    """Splits by patient, shares of the patients: train=0.8,val=0.1,test=0.1."""
    patient_pattern: str | None = None
    """Regular expression that finds the patient in a slide's name (a picture's path where it has no
    slide): its group patient, else its first, else all of it; '.*' where each slide is a patient.
    Names of TCGA, CPTAC, GTEx and CAMELYON need none."""
    tile_downsample: float = 1.0
    """Pixels of level 0 a pixel of tiles named <column>_<row>: 2 for tiles of 20x from 40x."""
    assume_mpp: float | None = None
    """Micrometres a pixel of slides that record neither it nor a magnification, or pixels that are
    not square."""
    enlarge: bool = False
    """Cut patches finer than a slide is: enlarged by more than 5 %, they show nothing new."""
    tissue: Literal["otsu", "clam", "dsmil", "none"] = "otsu"
    """What of a slide is tissue: saturation above Otsu's threshold, above CLAM's, patches with
    edges as DSMIL's tiler keeps them, or everything."""
    min_tissue: float = 0.25
    """Share of tissue a patch of a slide must have."""
    edges: Literal["drop", "pad"] = "drop"
    """Patches that reach beyond a slide: left out, or filled up with white."""
    preset: Literal["paper"] | None = None
    """paper: slides as Yellapragada et al. cut them (DSMIL's tiler -m 0 -b 20 -s 256): 256 px at
    20x, edges rule; but to just 0.5 mpp where DSMIL takes the nearest level by magnification, and
    without its stretched tiles at the edges. Sets --patch-size, --mpp and --tissue."""
    anonymize: Path | None = None
    """File of a secret key, made where there is none: slide and source names are stored as keyed
    hashes. Keep it: with it the same slide gets the same name again."""
    order: Literal["shuffle", "path"] = "shuffle"
    """Order of the pictures on disk: shuffled by --seed, or by path. Tiles of one stay together."""
    mix: int | None = None
    """Shuffle the patches of so many pictures (tiled ones, slides) among each other, so that packs
    hold patches of many."""
    pack_size: int = 256
    """Patches stored as one record."""
    pack_by_slide: bool = False
    """All patches of a slide as one record (order is then by slide)."""
    shard_mb: int = 256
    """Size of a shard in MB of codes."""
    encode_batch: int | None = None
    """Patches encoded at once; chosen once and recorded where not given."""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."""
    workers: int | None = None
    """Threads that read and decode pictures; the number of cores, at most 16, by default."""
    max_px: int = 89_478_485
    """Pixels above which a picture is refused (Pillow's own limit against decompression bombs)."""
    max_bad: int = 0
    """Pictures that may be left out as unreadable; listed with reasons in the manifest."""
    overwrite: bool = False
    """Replace what lies in --out."""
    engine: Literal["local", "ray"] = "local"
    """Where pictures are encoded: in this process, or by workers on a Ray cluster, a shard each at
    a time. Every node must see the input and --out under the same paths (a shared file system), be
    of one kind, and have latentds installed. Killed, it goes on by the same command, on either."""
    address: str = "auto"
    """Ray cluster: auto for the one this machine belongs to, local to start one on this machine, or
    ray://host:10001."""
    ray_workers: int | None = None
    """Most workers at once; as many as the cluster has room for by default."""
    gpus_per_worker: float | None = None
    """GPUs a Ray worker takes, 0 to 1; 1 by default where --device is a GPU."""
    cpus_per_worker: float | None = None
    """CPUs a Ray worker takes; by default a GPU's share of the node's, or, without GPUs, as many as
    the encoder has threads."""

    @property
    def codebook_kind(self) -> str | None:
        """The kind that --codebook names; None where it names a file, or nothing."""
        name = str(self.codebook)
        return name if name in CODEBOOK_KINDS else None

    @property
    def codebook_file(self) -> Path | None:
        """The file that --codebook names, if it does."""
        return None if self.codebook_kind else self.codebook

    def __post_init__(self) -> None:
        # A Path leaves hf:/ of hf://; sources.hugging_face.hub_id knows both.
        object.__setattr__(self, "source", Path(self.source))
        if self.preset == "paper":
            for name, value in PAPER.items():
                if getattr(self, name) not in (
                    value,
                    ConvertConfig.__dataclass_fields__[name].default,
                ):
                    raise InputError(f"--preset paper sets --{name.replace('_', '-')}; leave it")
                object.__setattr__(self, name, value)
        if self.resize + self.tile + self.pad > 1:
            raise InputError("choose one of --resize, --tile and --pad")
        if (self.resize or self.tile or self.pad) and self.patch_size is None:
            raise InputError("--resize, --tile and --pad need --patch-size PX")
        is_scalar = self.codebook_kind in (None, "scalar") and self.codebook_file is None
        if not is_scalar and (self.quantizer != "kmeans" or self.levels != 256):
            raise InputError("--codebook says what the levels are; leave --quantizer and --levels")
        if self.bytes is not None and (self.quantizer != "kmeans" or self.levels != 256):
            raise InputError(
                f"--bytes {self.bytes} is of additive codes and of records; --quantizer and "
                "--levels choose a byte a latent value. Leave one of them"
            )
        if self.bytes is not None and self.codebook_kind == "scalar":
            raise InputError("--bytes: scalar codes take a byte a latent value; leave it, or take "
                             "--codebook additive or rans")  # fmt: skip
        for name in ("masks", "slides", "root"):
            folder = getattr(self, name)
            if folder is not None and not folder.is_dir():
                raise InputError(f"--{name} {folder}: no such folder")
        if self.only is not None and not self.only.is_file():
            raise InputError(f"--only {self.only}: no such file")
        for name in ("splits", "slide_table"):
            table = getattr(self, name)
            if table is not None and not table.is_file():
                raise InputError(f"--{name.replace('_', '-')} {table}: no such file")
        if self.splits is not None and self.split_patients is not None:
            raise InputError("choose one of --splits and --split-patients")
        if self.splits is not None and self.slide_table is not None:
            raise InputError("choose one of --splits and --slide-table, which may have splits too")
        if self.patient_pattern is not None:
            if self.split_patients is None:
                raise InputError("--patient-pattern is for --split-patients; pass both")
            try:
                re.compile(self.patient_pattern)
            except re.error as error:
                raise InputError(
                    f"--patient-pattern {self.patient_pattern!r} is no regular expression ({error})"
                ) from error
        if self.stride is not None and not self.tile:
            raise InputError("--stride is the step of --tile; pass both")
        limits = {
            "patch_size": (8, 8192), "stride": (1, 8192), "levels": (2, 256),
            "pack_size": (1, 65536), "shard_mb": (1, 65536), "encode_batch": (1, 65536),
            "bytes": (16, 1 << 20), "refine": (0, 256),
            "fit_patches": (1, 10**7), "workers": (1, 256), "max_px": (64, 2**34),
            "max_bad": (0, 10**9), "mix": (2, 10**6), "seed": (0, 2**31),
            "ray_workers": (1, 10**5), "gpus_per_worker": (0, 1), "cpus_per_worker": (0.01, 1024),
        }  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(
                    f"--{name.replace('_', '-')} {value} is not between {low} and {high}"
                )
        for name in ("mpp", "assume_mpp"):
            value = getattr(self, name)
            if value is not None and not 0.01 <= value <= 100:
                raise InputError(
                    f"--{name.replace('_', '-')} {value} micrometres a pixel is not between 0.01 "
                    "and 100"
                )
        if not 0 <= self.min_tissue <= 1:
            raise InputError(f"--min-tissue {self.min_tissue} is not between 0 and 1")

    def recorded(self) -> dict[str, Any]:
        """The options that decide about bytes: no path, no host, nothing of how fast."""
        names = {field.name for field in dataclasses.fields(ConvertConfig)} - set(NOT_RECORDED)
        if self.codebook_file is not None:
            names -= {"quantizer", "levels", "fit_patches"}  # the codebook's own record tells
        found = {name: getattr(self, name) for name in sorted(names)}
        # None where not given: plans of before these options were there have them as None, too.
        found |= {name: getattr(self, name) for name in ("bytes", "kind", "patient_pattern")}
        found |= {name: getattr(self, name) or None for name in ("enlarge", "refine")}
        found["codebook"] = self.codebook_kind
        return found | {"anonymized": self.key_check()}

    def key_check(self) -> str | None:
        """Which key names are hidden with, None where they are not: a resumed run must have it."""
        from latentds.sources.anonymity import Anonymizer

        return Anonymizer(self.anonymize).check if self.anonymize else None
