"""Latents that others made, listed and read: PixCell and ZoomLDM trees, npy trees, array files."""
# C latent channels, h w latent cells

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from latentds.core.storage import take_paths
from latentds.edit.arrays import ARRAY_SUFFIXES, LABELS, ArrayFile, read_npy, read_npy_header
from latentds.edit.exporting import TABLE
from latentds.errors import InputError
from latentds.sources.csv_tables import TextTable, read_table
from latentds.sources.image_folder import (
    DEFAULT_SPLIT,
    Folders,
    are_splits,
    check_labels,
    check_names,
    read_folders,
    walk,
)
from latentds.sources.names import name_fields, numbers_of
from latentds.sources.picture import Picture
from latentds.store.composing import SHARD_BYTES

logger = logging.getLogger(__name__)
PIXCELL = re.compile(r"[^/]_sd3_vae\.npy$")  # PixCell: extract_features.py
ZOOMLDM = re.compile(r"(?:^|/)(\d+)_vae\.npy$")  # ZoomLDM: ldm/data/brca.py
TILE_FOLDER = re.compile(r"single(_\d+)?")  # between class and slide in trees of DSMIL's tiler
MAX_OPEN_FILES = 256  # closing an npz means to unpack it again
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForeignPatch(Picture):
    """One patch's latents in someone's file, and what names and tables say of it.

    path  file relative to the input; row  of the file's array, None where the file is one patch
    codebook_id  that an export's table tells of its codes; empty where nothing does
    """

    split: str = DEFAULT_SPLIT
    path: str
    row: int | None = None
    source_encoding: str = ""
    codebook_id: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the files do not say themselves.

    layout        None: whatever lies there
    labels, split_folders  class folders (and array files' labels) as labels, top folders as splits
    name_pattern  groups among label, slide, x, y, mpp in relative paths
    mpp           of every patch
    scale, shift  a latent is stored value * scale + shift, unscaled encoder output; None: floats
                  are taken as they are, bytes are refused
    codebook      file: floats are quantized with it, bytes are its codes
    quantizer, levels, fit_patches   of the codebook fitted where none is given
    patch_px      edge of a patch in pixels; None: latent cells times the autoencoder's factor
    shape         (C, h, w) of rows that are stored flat
    order         "shuffle" by the seed, or "path"
    """

    layout: str | None = None
    labels: bool = True
    split_folders: bool = True
    name_pattern: str | None = None
    mpp: float | None = None
    scale: float | None = None
    shift: float | None = None
    codebook: Path | None = None
    quantizer: str = "kmeans"
    levels: int = 256
    fit_patches: int = 1000
    patch_px: int | None = None
    shape: tuple[int, int, int] | None = None
    order: Literal["shuffle", "path"] = "shuffle"
    pack_size: int = 256
    shard_bytes: int = SHARD_BYTES
    seed: int = 0

    def __post_init__(self) -> None:
        take_paths(self)


def list_latents(root: Path, options: ImportOptions) -> tuple[str, list[ForeignPatch]]:
    """The layout found (or asked for) and its patches, in the order of their paths.

    raises  InputError where there are none, FileNotFoundError where there is no such input
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such file or folder")
    paths = [root.name] if root.is_file() else list(walk(root))
    base = root.parent if root.is_file() else root
    check_names(base, paths)
    layout = options.layout or detect(base, paths)
    listers: dict[str, Callable[[Path, list[str], ImportOptions], list[ForeignPatch]]] = {
        "pixcell": list_pixcell,
        "zoomldm": list_zoomldm,
        "npy": list_npy,
        "arrays": list_arrays,
    }
    patches = listers[layout](base, paths, options)
    if not patches:
        raise InputError(f"{root}: no latents of layout {layout!r} in it ({len(paths)} files)")
    if options.name_pattern:
        find = name_fields(options.name_pattern, options.labels)
        patches = [dataclasses.replace(patch, **find(patch.source)) for patch in patches]
    return layout, [dataclasses.replace(p, mpp=p.mpp or options.mpp) for p in patches]


def detect(base: Path, paths: Sequence[str]) -> str:
    """The layout of what lies there, by its file names and the first array's dimensions."""
    if export_table(base, paths) is not None:
        return "npy"
    if any(PIXCELL.search(path) for path in paths):
        return "pixcell"
    if any(ZOOMLDM.search(path) for path in paths):
        return "zoomldm"
    npy = next((path for path in paths if path.endswith(".npy")), None)
    if npy is not None and len(read_npy_header(base / npy)[0]) in (1, 3):
        return "npy"
    if any(PurePosixPath(path).suffix in ARRAY_SUFFIXES for path in paths):
        return "arrays"
    raise InputError(
        f"{base}: no latents found among {len(paths)} files; known are *_sd3_vae.npy (PixCell), "
        "N_vae.npy (ZoomLDM), .npy of (C, h, w), and .npy, .npz or .safetensors of (N, C, h, w)"
    )


def list_pixcell(base: Path, paths: list[str], options: ImportOptions) -> list[ForeignPatch]:
    """`.../CLASS/[single_1024/]SLIDE/COL_ROW_sd3_vae.npy`."""
    found = [path for path in paths if PIXCELL.search(path)]
    rule = split_rule(base, found, options)
    patches = []
    for path in found:
        split, folders = rule.parts(path)
        folders = [folder for folder in folders if not TILE_FOLDER.fullmatch(folder)]
        patches.append(
            ForeignPatch(
                source=path,
                path=path,
                split=split,
                label=folders[-2] if options.labels and len(folders) > 1 else None,
                slide=folders[-1] if folders else None,
            )
        )
    check_labels(base, patches, options.labels)
    return patches


def split_rule(base: Path, paths: list[str], options: ImportOptions) -> Folders:
    return Folders(options.split_folders and are_splits(base, paths), options.labels)


def list_zoomldm(base: Path, paths: list[str], options: ImportOptions) -> list[ForeignPatch]:
    """`[SPLIT/]MAG/MILLION/INDEX_vae.npy`, by folder and number."""
    found = [(path, match) for path in paths if (match := ZOOMLDM.search(path))]
    rule = split_rule(base, [path for path, _ in found], options)
    found.sort(key=lambda pair: (str(PurePosixPath(pair[0]).parent), int(pair[1][1])))
    return [ForeignPatch(source=p, path=p, split=rule.parts(p)[0]) for p, _ in found]


def list_npy(base: Path, paths: list[str], options: ImportOptions) -> list[ForeignPatch]:
    """One npy a patch in [split/][class/[slide/]] folders, or as `latentds export` wrote them."""
    if (table := export_table(base, paths)) is not None:
        return [
            table_patch(f"{table.path}, line {line}", row)
            for line, row in zip(table.lines, table.rows, strict=True)
        ]
    found = [path for path in paths if path.endswith(".npy")]
    rule = read_folders(base, found, options.labels, options.split_folders)
    for note in rule.notes:
        logger.info("%s", note)
    pictures = [rule.place(path) for path in found]
    check_labels(base, pictures, options.labels)
    return [
        ForeignPatch(source=p.source, path=p.source, split=p.split, label=p.label, slide=p.slide)
        for p in pictures
    ]


def export_table(base: Path, paths: Sequence[str]) -> TextTable | None:
    """The table.csv that `latentds export` wrote; None where there is none, or of another kind."""
    table = read_table(base / TABLE) if TABLE in paths else None
    is_own = table and {"path", "split", "source", "codebook_id"} <= set(table.columns)
    return table if is_own else None


def table_patch(where: str, record: dict[str, str]) -> ForeignPatch:
    """The patch of a line; InputError where its path leads out or a number is none."""
    path = PurePosixPath(record["path"])
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise InputError(f"{where}: path {str(path)!r} leads out; refused")
    source = PurePosixPath(record["source"])
    if source.is_absolute() or not source.name:  # where files lie on a machine is nobody's business
        raise InputError(f"{where}: source {str(source)!r} is not relative")
    known = {name: record[name] for name in ("x", "y", "mpp", "size_px") if record.get(name)}
    numbers: dict[str, Any] = dict(numbers_of(where, known))
    return ForeignPatch(
        source=record["source"],
        path=str(path),
        split=record["split"],
        label=record.get("label") or None,
        slide=record.get("slide") or None,
        source_encoding=record.get("source_encoding", ""),
        codebook_id=record["codebook_id"],
        **numbers,
    )


def list_arrays(base: Path, paths: list[str], options: ImportOptions) -> list[ForeignPatch]:
    """Every row of every array file, with the slide and place that arrays beside tell.

    Its source is `FILE/NNNNNN.SUFFIX`.
    """
    found = [path for path in paths if PurePosixPath(path).suffix in ARRAY_SUFFIXES]
    found = [path for path in found if not PurePosixPath(path).name.startswith("codebook-")]
    rule = split_rule(base, found, options)
    patches = []
    for path in found:
        with contextlib.closing(ArrayFile(base / path)) as file:
            rows, columns = file.shape[0], file.places()[0]
            if options.labels and (labels := file.labels()):
                columns["label"] = labels
        stem, suffix = path.rpartition(".")[0], PurePosixPath(path).suffix
        split = rule.parts(path)[0]
        patches += [
            ForeignPatch(
                source=f"{stem}/{row:06d}{suffix}",
                path=path,
                row=row,
                split=split,
                **{name: values[row] for name, values in columns.items()},
            )
            for row in range(rows)
        ]
    check_labels(base, patches, options.labels)
    return patches


class LatentFiles:
    """Latents of patches that were listed in a folder, one by one.

    base      the folder their paths are relative to
    layout    how they were listed; of PixCell's mean and std the mean is taken
    first     a patch, whose shape and type all others must have

    shape      (C, h, w), or (R,) of entropy-coded records
    dtype      as stored
    not_taken  what the files hold besides
    """

    def __init__(
        self, base: Path, layout: str, first: ForeignPatch, options: ImportOptions
    ) -> None:
        self.base, self.layout, self.flat = base, layout, options.shape
        self.scale = 1.0 if options.scale is None else options.scale
        self.shift = 0.0 if options.shift is None else options.shift
        self.files: OrderedDict[str, ArrayFile] = OrderedDict()
        self.dtype, self.not_taken = "", list[str]()
        if first.row is not None:
            file = self.array(first.path)
            taken = {file.name, *LABELS, *file.places()[1]}
            self.not_taken = [name for name in file.names if name not in taken]
        elif layout == "pixcell":
            self.not_taken = ["std"]
        values = self.read(first)
        if self.dtype not in (*FLOATS, "uint8"):
            raise InputError(
                f"{base / first.path}: stored as {self.dtype}; latents are {', '.join(FLOATS)} or "
                "uint8"
            )
        is_record = len(values.shape) == 1 and self.dtype == "uint8"
        if not (is_record or len(values.shape) == 3) or min(values.shape) < 1:
            raise InputError(
                f"{base / first.path}: latents of shape {values.shape}, not (C, h, w); pass --shape"
            )
        self.shape: tuple[int, ...] = values.shape

    def read(self, patch: ForeignPatch) -> np.ndarray:
        """What of a patch's stored values are its latents, in their own type and shape."""
        path = self.base / patch.path
        if patch.row is not None:
            file = self.array(patch.path)
            values, dtype = self.shaped(file.row(patch.row), path), file.dtype
        else:
            values = read_npy(path)
            dtype = str(values.dtype)
            values = mean_of(values, path) if self.layout == "pixcell" else values
        self.dtype = self.dtype or dtype
        if dtype != self.dtype:
            raise InputError(
                f"{path}: stored as {dtype}, others as {self.dtype}; import them apart"
            )
        return values

    def stored(self, patch: ForeignPatch) -> np.ndarray:
        """Stored values of a patch; InputError where they have another shape than the first."""
        values = self.read(patch)
        if values.shape != self.shape:
            raise InputError(
                f"{self.base / patch.path}: values of {values.shape}, others of {self.shape}; cut "
                "short, or to be imported apart"
            )
        return values

    def latents(self, patch: ForeignPatch) -> np.ndarray:
        """Latents float32 (C, h, w), scaled; InputError for NaN and infinity."""
        with np.errstate(over="ignore", invalid="ignore"):
            exact = self.stored(patch).astype(np.float32)
            values: np.ndarray = exact * np.float32(self.scale) + np.float32(self.shift)
        if not np.isfinite(values).all():
            where = "" if patch.row is None else f", row {patch.row}"
            raise InputError(
                f"{self.base / patch.path}{where}: NaN or infinity in it; encode it anew, or take "
                "it away"
            )
        return values

    def encoding(self, patch: ForeignPatch) -> str:
        return f"{Path(patch.path).suffix.removeprefix('.')}:{self.dtype}"

    def array(self, path: str) -> ArrayFile:
        """An array file, opened; the last few stay open."""
        if path not in self.files:
            if len(self.files) >= MAX_OPEN_FILES:
                self.files.popitem(last=False)[1].close()
            self.files[path] = ArrayFile(self.base / path)
        self.files.move_to_end(path)
        return self.files[path]

    def shaped(self, values: np.ndarray, path: Path) -> np.ndarray:
        if self.flat is None:
            return values
        if values.size != int(np.prod(self.flat)):
            raise InputError(f"{path}: rows of {values.size} values are not --shape {self.flat}")
        return values.reshape(self.flat)

    def __enter__(self) -> LatentFiles:
        return self

    def __exit__(self, *rest: object) -> None:
        for file in self.files.values():
            file.close()


def mean_of(values: np.ndarray, path: Path) -> np.ndarray:
    """The mean (C, h, w) of PixCell's mean and std (2C, h, w); InputError where that is not it."""
    if values.ndim != 3 or len(values) % 2:
        raise InputError(f"{path}: {values.shape} is not mean and std, (2C, h, w); --layout npy?")
    mean, std = np.split(values, 2)
    if (std < 0).any():
        raise InputError(f"{path}: negative values where a std should be; --layout npy?")
    return mean
