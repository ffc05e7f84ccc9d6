"""Read the latents of any listed patch, checked against the first: LatentFiles."""
# C latent channels, h w latent cells

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np

from latentds.edit.arrays import LABELS, ArrayFile, read_npy
from latentds.edit.layouts import ForeignPatch
from latentds.errors import InputError

MAX_OPEN_FILES = 256  # closing an npz means to unpack it again
FLOATS = ("float16", "bfloat16", "float32", "float64")


class LatentFiles:
    """Latents of patches that were listed in a folder, one by one.

    base      the folder their paths are relative to
    layout    how they were listed; of PixCell's mean and std the mean is taken
    first     a patch, whose shape and type all others must have
    scaling   scale and shift from stored values to latents, None for 1 and 0
    flat      (C, h, w) of rows stored flat

    shape      (C, h, w), or (R,) of entropy-coded records
    dtype      as stored
    not_taken  what the files hold besides
    """

    def __init__(
        self,
        base: Path,
        layout: str,
        first: ForeignPatch,
        scaling: tuple[float | None, float | None] = (None, None),
        flat: tuple[int, int, int] | None = None,
    ) -> None:
        self.base, self.layout, self.flat = base, layout, flat
        self.scale = 1.0 if scaling[0] is None else scaling[0]
        self.shift = 0.0 if scaling[1] is None else scaling[1]
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
