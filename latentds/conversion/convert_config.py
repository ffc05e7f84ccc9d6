"""Settings of a conversion. No heavy import: `latentds convert --help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from latentds.core.storage import check_ranges
from latentds.errors import InputError
from latentds.quantizers.scalar_fit import KindName, check_kind
from latentds.sources.cut_options import SourceOptions

# What may differ between a run and its resumption: it changes no byte of the result.
# The autoencoder may be a path; the contract names it.
PAPER = {"patch_size": 256, "mpp": 0.5, "tissue": "dsmil"}
NOT_RECORDED = (
    "autoencoder",
    "location",
    "source",
    "slides",
    "root",
    "splits",
    "slide_table",
    "enlarge",  # told where given, as refine is: plans of before them are compared with
    "magnification",  # told as mpp
    "mpp_tolerance",
    "only",
    "regions",  # told as by_regions
    "label_from",
    "anonymize",
    "out",
    "masks",
    "codebook",
    "device",
    "workers",
    "max_bad",
    "refine",
    "encode_dtype",
    "overwrite",
    "engine",
    "address",
    "ray_workers",
    "cpus_per_worker",
)


CODEBOOK_KINDS = ("scalar", "additive", "rans")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """What is made: where, of which latents, in how many bytes; ConvertConfig's first options."""

    panel = "codes"

    out: Path
    """Folder of the data set to make, or a location such as s3://bucket/brca. For a location, the
    set is made in a local folder first, and then uploaded."""
    autoencoder: str = "tiny-v2"
    """Autoencoder that encodes the patches: tiny-v2, tiny-v2-fast, tiny-v2-cpu, tiny-v1, sd15, sd3,
    dcae-f32, dcae-f32-mix, taesd, taesd3, sd15-path, sd3-path, dcae-f32-path; or a local folder of
    weights."""
    quantizer: KindName = "kmeans"
    levels: int = 256
    """Levels of the codebook, 2 to 256."""
    codebook: Path | None = None
    """Kind of codes, or a codebook file of 'latentds fit-codebook'. The kind scalar stores a byte a
    latent value, additive stores sums of vectors in --bytes, and rans stores entropy-coded records
    of --bytes. By default what ships with the autoencoder, else scalar, or additive where --bytes
    is given."""
    bytes: int | None = None
    """Bytes a patch. Entropy-coded records (rans) can have any number. Additive codes need a
    multiple of the latent cells, of which a patch of 256 px has 1,024 at f8."""
    refine: int = 0
    """Gradient steps on the latents of every patch, through the decoder, before they are coded. The
    codes then keep more in the same bytes. A step takes as long as some three decodings; 4 steps
    bring most of the gain."""
    fit_patches: int = 1000
    """Patches that the codebook is fitted to, drawn by --seed."""

    @property
    def codebook_kind(self) -> str | None:
        """The kind that --codebook names; None where it names a file, or nothing."""
        name = str(self.codebook)
        return name if name in CODEBOOK_KINDS else None

    @property
    def codebook_file(self) -> Path | None:
        return None if self.codebook_kind else self.codebook

    def check_codes(self) -> None:
        """Refuse an unknown quantizer, and two choices of codes that exclude each other."""
        check_kind(self.quantizer)
        is_scalar = self.codebook_kind in (None, "scalar") and self.codebook_file is None
        if is_scalar and self.bytes is None:
            return
        if self.quantizer != "kmeans" or self.levels != 256:
            raise InputError("--codebook and --bytes say what the codes are; leave --quantizer and "
                             "--levels, which choose a byte a latent value")  # fmt: skip
        if self.codebook_kind == "scalar":
            raise InputError("--bytes: scalar codes take a byte a latent value; leave it, or take "
                             "--codebook additive or rans")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(SourceOptions, CodeOptions):
    """Convert pictures or slides into a latentds data set.

    Class folders become labels, and train/val/test folders become splits. A killed run is resumed
    by the same command.
    """

    PANELS: ClassVar[dict[str, tuple[str, ...]]] = {
        "ray": ("engine", "address", "ray_workers", "cpus_per_worker"),
        "packs": ("order", "mix", "pack_size", "pack_by_slide", "shard_mb", "encode_batch"),
    }
    panel = "run"

    source: Annotated[Path, tyro.conf.Positional]
    """Input: 8-bit pictures, slides or archives of them (tar, Parquet), a folder or one of them; a
    table of paths, a data set saved by Hugging Face's save_to_disk, a location such as
    s3://bucket/slides, or hf://datasets/ORG/NAME[@REVISION]. A location is copied to --work first;
    of tiled slides, only the tiles that are read."""
    preset: Literal["paper"] | None = None
    """paper: cut slides as Yellapragada et al. did with DSMIL's tiler (-m 0 -b 20 -s 256), which is
    256 px at 20x with the edges rule. Sets --patch-size, --mpp and --tissue. Two things differ:
    slides are cut at 0.5 mpp within --mpp-tolerance or resampled to it, where DSMIL takes the
    nearest level by magnification, and DSMIL's stretched tiles at the edges are left out."""
    order: Literal["shuffle", "path"] = "shuffle"
    """Order on disk: shuffled by --seed, or by path. Tiles of one picture stay together."""
    mix: int | None = None
    """Shuffle the patches of this many slides or tiled pictures among each other, so that every
    pack holds patches of many."""
    pack_size: int = 256
    """Patches in a pack, which is stored as one record."""
    pack_by_slide: bool = False
    """Store all patches of a slide as one pack; the order is then by slide."""
    shard_mb: int = 256
    """Size of a shard in MB of codes."""
    encode_batch: int | None = None
    """Patches encoded at once. By default the number is chosen once and recorded."""
    encode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the encoder computes with. bfloat16 is faster on GPUs and CPUs that have
    it, and far slower on others. Codes differ a little. It is recorded."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    workers: int | None = None
    """Threads that read and decode pictures. By default the number of cores, at most 16."""
    max_bad: int = 0
    """Unreadable pictures that may be left out. The manifest lists them with reasons."""
    overwrite: bool = False
    """Replace what lies in --out."""
    engine: Literal["local", "ray"] = "local"
    """Where pictures are encoded: in this process (local), or by workers on a Ray cluster, a shard
    each at a time. All nodes must be of one kind, have latentds installed, and see the input and
    --out under the same paths (a shared file system). A killed run resumes on either engine."""
    address: str = "auto"
    """Ray cluster: auto for the cluster of this machine, local to start one on this machine, or
    ray://host:10001."""
    ray_workers: int | None = None
    """Ray workers at once, at most. By default as many as the cluster has room for."""
    cpus_per_worker: float | None = None
    """CPUs that a Ray worker takes. By default a GPU's share of the node's CPUs; without GPUs, as
    many as the encoder has threads."""

    def __post_init__(self) -> None:
        if self.preset == "paper":
            if self.magnification is not None:
                raise InputError("--preset paper sets --mpp; leave --magnification")
            for name, value in PAPER.items():
                if getattr(self, name) not in (
                    value,
                    ConvertConfig.__dataclass_fields__[name].default,
                ):
                    raise InputError(f"--preset paper sets --{name.replace('_', '-')}; leave it")
                object.__setattr__(self, name, value)
        super().__post_init__()
        self.check_codes()
        check_ranges(
            self,
            levels=(2, 256), pack_size=(1, 65536), shard_mb=(1, 65536), encode_batch=(1, 65536),
            bytes=(16, 1 << 20), refine=(0, 256), fit_patches=(1, 10**7), workers=(1, 256),
            max_bad=(0, 10**9), mix=(2, 10**6), ray_workers=(1, 10**5),
            cpus_per_worker=(0.01, 1024),
        )  # fmt: skip

    def recorded(self) -> dict[str, Any]:
        """The options that decide about bytes: no path, no host, nothing of how fast."""
        names = {field.name for field in dataclasses.fields(ConvertConfig)} - set(NOT_RECORDED)
        if self.codebook_file is not None:
            names -= {"quantizer", "levels", "fit_patches"}  # the codebook's own record tells
        found = {name: getattr(self, name) for name in sorted(names)}
        found |= {name: getattr(self, name) or None for name in ("enlarge", "refine")}
        if self.encode_dtype != "float32":
            found["encode_dtype"] = self.encode_dtype
        # Without --mpp it decides nothing.
        found["mpp_tolerance"] = None if self.mpp is None else self.mpp_tolerance or None
        found["by_regions"] = None if self.regions is None else self.label_from or "taken"
        found["codebook"] = self.codebook_kind
        return found | {"anonymized": self.key_check()}
