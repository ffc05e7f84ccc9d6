"""What a set of patches is to an evaluation, of pictures, a codec or latents; its settings."""
# N patches of the set, n of a request, H W pixels

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from latentds.core.storage import location_of, take_paths
from latentds.errors import InputError
from latentds.sources.cut_options import CutOptions, SourceOptions

ORIGINAL = "original"
OF_ORIGINALS = (
    *("masks", "split_folders", "use_labels"),
    *(field.name for field in dataclasses.fields(CutOptions) if field.name != "max_px"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PatchTable:
    """What is known of every patch, in canonical order: sorted by (source, y, x).

    Originals and shards converted from them with the same options have the same rows.

    sources  file that a patch was cut from, relative to the input
    slides   names, None where unknown
    labels   int64 (N,), indices into the set's classes, -1 for none
    x, y     int64 (N,), left and top in pixels of level 0, -1 where unknown
    mpp      float32 (N,), micrometres a pixel of the patch, NaN where unknown
    size_px  int64 (N,), width of a patch in the pixels that x and y count, 0 where unknown
    splits   train, val, test, ...
    patients  names that a table, or another record beside the patches, tells, None where unknown;
              empty for data sets, which store none
    """

    sources: list[str]
    slides: list[str | None]
    labels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    mpp: np.ndarray
    size_px: np.ndarray
    splits: list[str]
    patients: list[str | None] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sources)

    def class_names(self, classes: Sequence[str], where: str, remedy: str) -> list[str]:
        """The class's name of every patch; InputError, with the remedy, where any has none."""
        bare = np.flatnonzero(self.labels < 0)
        if len(bare):
            raise InputError(
                f"{where}: {len(bare):,} of {len(self):,} patches have no label, the first is "
                f"{self.sources[bare[0]]!r}; {remedy}"
            )
        return [classes[number] for number in self.labels.tolist()]

    @property
    def names(self) -> list[str]:
        """A patch's name, unique in the set: its source, and its place where that is known."""
        return [
            source if x < 0 and y < 0 else f"{source}@{x},{y}"
            for source, x, y in zip(self.sources, self.x.tolist(), self.y.tolist(), strict=True)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """Where the pixels of an evaluation come from: a row of its table.

    name             original, jpeg:10, tiny-v1+kmeans; a decoder that is not the recorded one
                     after a slash
    kind             original, codec (originals through one, on the fly) or latents (shards)
    codec            as it is written: original, jpeg:10, tiny-v1+kmeans
    autoencoder      name, None for originals and picture formats
    decoder          name of the decoder where it is another than the autoencoder's own
    fine_tuned       whether the decoder was trained anew for latents that were there before
    quantized        whether latents went through a codebook
    bytes_per_patch  mean of what a patch takes stored: by arithmetic for latents, measured for
                     picture formats; of originals, their files' bytes over their patches. None
                     where it cannot be told
    patch_px         (H, W)
    data             the input as it was given
    codebook         where the codebook is from, and its identity; empty for none
    """

    name: str
    kind: Literal["original", "codec", "latents"]
    codec: str
    autoencoder: str | None = None
    decoder: str | None = None
    fine_tuned: bool = False
    quantized: bool = False
    bytes_per_patch: float | None = None
    patch_px: tuple[int, int]
    data: str
    codebook: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"patch_px": list(self.patch_px)}


def canonical_order(sources: Sequence[str], y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """int64 (N,): places of patches sorted by source (by code points), y and x."""
    rank = {source: place for place, source in enumerate(sorted(set(sources)))}
    numbers = np.fromiter((rank[source] for source in sources), np.int64, len(sources))
    return np.lexsort((x, y, numbers)).astype(np.int64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchSource:
    """Which patches, through which codec: PatchInput's first options."""

    panel = "patches"

    data: Path
    """Originals as 'latentds convert' takes them (a folder of pictures or slides, archives, a table
    of paths), or a latentds data set: its folder, hf://datasets/ORG/NAME[@REVISION], s3://..."""
    codec: str = ORIGINAL
    """Codec that originals go through, patch by patch: original (none), a picture format (jpeg:10,
    or avif@4096 for at most so many bytes), or an autoencoder with or without a quantizer
    (dcae-f32, tiny+kmeans, FOLDER+kmeans). A data set has its own codec."""
    decoder: str | None = None
    """Decoder to use instead of the recorded one: a decoder's folder, an autoencoder's name, or
    ORG/NAME[@REVISION]. For latents, and for codecs of latents."""
    codebook: Path | None = None
    """Codebook file of 'latentds fit-codebook' for a codec such as dcae-f32+kmeans. By default a
    codebook is fitted to a sample of the patches."""
    split: str | None = None
    """Take only the patches of this split."""
    groups: Path | None = None
    """CSV of the groups that must stay together in folds: a column slide, source, bag or path, and
    one of group, patient, case_id or tma_core."""
    use_labels: bool = True
    """Take class folders, or the label of tables and archives, as labels."""
    split_folders: bool = True
    """Take top folders named train, val, valid, validation and test as splits."""
    masks: Path | None = None
    """Folder of the originals' masks, 8-bit PNG or TIFF. A mask has the relative path of its
    picture, suffix aside, and the same size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchInput(CutOptions, PatchSource):
    """Patches that an evaluation reads; a recipe's or tool's settings inherit them.

    A class that inherits from several calls `PatchInput.__post_init__(self)` in its own.
    """

    decode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format in which latents are decoded. bfloat16 is faster on a GPU."""
    decode_compile: bool = False
    """Compile the decoder with torch.compile. Starting then takes a minute or so longer, and
    decoding on a GPU is faster."""
    check_codes: bool = True
    """Compare the checksums of latents when they are first read."""
    keep_mb: int = 2048
    """MB of pixels kept in memory for the next epoch; 0 keeps none."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    workers: int | None = None
    """Threads that read, decode and encode pictures. By default the number of cores, at most 16."""

    def __post_init__(self) -> None:
        take_paths(self)
        if not self.codec.strip():
            raise ValueError(f"codec is empty; {ORIGINAL!r} leaves pictures as they are")
        if self.keep_mb < 0:
            raise ValueError(f"keep_mb is {self.keep_mb}; 0 or more")
        if self.workers is not None and not 1 <= self.workers <= 256:
            raise ValueError(f"workers is {self.workers}, not between 1 and 256")

    @property
    def location(self) -> str:
        """The input as text; a Path has taken one of the slashes of s3:// and hf://."""
        return location_of(self.data) or str(self.data)

    def source_options(self) -> SourceOptions:
        """What the originals are opened with; InputError for settings that cannot be."""
        names = [field.name for field in dataclasses.fields(CutOptions)]
        return SourceOptions(
            source=self.data,
            labels=self.use_labels,
            split_folders=self.split_folders,
            masks=self.masks,
            **{name: getattr(self, name) for name in names},
        )


def given_settings(config: PatchInput, names: Sequence[str]) -> dict[str, Any]:
    """Those of some settings that are not what they are by default."""
    defaults = {field.name: field.default for field in dataclasses.fields(PatchInput)}
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if value != defaults[name]}


def recorded_settings(config: PatchInput) -> dict[str, Any]:
    """What decides which patches there are and how latents are decoded, as JSON values."""
    chosen = given_settings(config, OF_ORIGINALS)
    chosen |= {"split": config.split, "decode_dtype": config.decode_dtype}
    if config.decode_compile:
        chosen["decode_compile"] = True
    return {name: str(v) if isinstance(v, Path) else v for name, v in chosen.items()}
