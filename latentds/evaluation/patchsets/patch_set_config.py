"""Settings of a set of patches: originals, a codec on the fly, or latents. No heavy import."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from latentds.sources.cut_options import CutOptions, SourceOptions

ORIGINAL = "original"
OF_ORIGINALS = (
    *("masks", "split_folders", "use_labels"),
    *(field.name for field in dataclasses.fields(CutOptions) if field.name != "max_px"),
)


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
    codebook_from: Path | None = None
    """Folder of other pictures to fit that codebook to."""
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
        object.__setattr__(self, "data", Path(self.data))
        if not self.codec.strip():
            raise ValueError(f"codec is empty; {ORIGINAL!r} leaves pictures as they are")
        if self.keep_mb < 0:
            raise ValueError(f"keep_mb is {self.keep_mb}; 0 or more")
        if self.workers is not None and not 1 <= self.workers <= 256:
            raise ValueError(f"workers is {self.workers}, not between 1 and 256")
        if self.codebook is not None and self.codebook_from is not None:
            raise ValueError("codebook and codebook_from: give one of them")

    @property
    def location(self) -> str:
        """The input as text; a Path has taken one of the slashes of s3:// and hf://."""
        scheme, colon, rest = self.data.as_posix().partition(":/")
        is_address = bool(colon) and scheme.isalnum() and len(scheme) > 1
        slashes = "///" if scheme == "file" else "//"
        return f"{scheme}:{slashes}{rest.lstrip('/')}" if is_address else str(self.data)

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
