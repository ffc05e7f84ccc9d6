"""Array files of others, read as untrusted: npy, npz and safetensors; sizes checked, no pickle."""
# N rows of a file

from __future__ import annotations

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from latentds.core.storage import check_regular, naming, open_regular
from latentds.errors import InputError, first_words
from latentds.store.format import NPY_ERRORS

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors")
LATENTS, LABELS = ("latents", "codes", "arr_0"), ("labels", "label", "y")  # names looked for
SLIDES, COORDS = ("slides", "slide"), ("coords",)
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "U8": "uint8"}
FREE_SHARE = 0.9  # of the free disk that an unpacked npz may take
MAX_LABELS_BYTES = 1 << 30
MAX_PLACE_PX = (1 << 31) - 1


def read_npy_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of an npy file whose content has just the bytes that they take."""
    with open_regular(path, str(path)) as file:
        return parse_npy_header(file, path.stat().st_size, str(path))


def parse_npy_header(
    file: BinaryIO, size: int, where: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a stream of `size` bytes; InputError for anything but plain numbers."""
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(file)
    except NPY_ERRORS as error:
        raise InputError(f"{where}: not an npy array ({first_words(error, 100)})") from error
    if dtype.hasobject or dtype.kind not in "fuiUSb":
        raise InputError(f"{where}: an array of {dtype}; only plain numbers are read, no pickles")
    announced = file.tell() + math.prod(shape) * dtype.itemsize
    if size != announced:
        raise InputError(
            f"{where}: {size} bytes, its header announces {announced} ({dtype} {shape}); truncated "
            "or damaged"
        )
    return tuple(shape), dtype


def read_npy(path: Path) -> np.ndarray:
    read_npy_header(path)
    values: np.ndarray = np.load(path, allow_pickle=False)
    return values


class ArrayFile:
    """An array file, of which rows are read in any order; `close` deletes what was unpacked.

    names   of its arrays; an empty one alone for npy
    name    of the latents' array
    shape   of that, (N, C, h, w) or (N, values); dtype  as stored: float32, bfloat16, uint8, ...
    raises  InputError where the file is none, or not clear
    """

    def __init__(self, path: Path) -> None:
        check_regular(path, str(path))
        self.path, self.kind = path, path.suffix.removeprefix(".")
        self.unpacked: tempfile.TemporaryDirectory[str] | None = None
        self.rows: np.ndarray | None = None
        self.file: Any = None
        self.names = [""]
        try:
            if self.kind == "safetensors":
                self.file = safe_open(path, framework="pt")
                self.names = list(self.file.keys())
            elif self.kind == "npz":
                self.file = zipfile.ZipFile(path)
                self.names = [name.removesuffix(".npy") for name in self.file.namelist()]
        except (SafetensorError, zipfile.BadZipFile, OSError, ValueError) as error:
            raise InputError(f"{path}: not a {self.kind} file ({error}); fetch it anew") from error
        self.name = self.choose_name()
        self.shape, self.dtype = self.facts_of(self.name)
        if len(self.shape) not in (2, 4) or min(self.shape) < 1:
            raise InputError(
                f"{path}: an array of shape {self.shape}; latents are (N, C, h, w), or "
                "(N, C*h*w) with --shape"
            )

    def choose_name(self) -> str:
        """Which array holds the latents; InputError where that is not clear."""
        known = [name for name in LATENTS if name in self.names]
        others = [name for name in self.names if name not in LABELS]
        if known or len(others) == 1:
            return known[0] if known else others[0]
        raise InputError(f"{self.path}: holds {sorted(self.names)}; the latents' array must be one "
                         f"of {', '.join(LATENTS)}, or the only one")  # fmt: skip

    def facts_of(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of an array, nothing large read."""
        if self.kind == "safetensors":
            view = self.file.get_slice(name)
            stored = view.get_dtype()
            if stored not in DTYPES:
                raise InputError(f"{self.path}: {name} is {stored}; known: {', '.join(DTYPES)}")
            return tuple(view.get_shape()), DTYPES[stored]
        if self.kind == "npz":
            entry = self.file.getinfo(f"{name}.npy")
            with self.file.open(entry) as stream:
                shape, dtype = parse_npy_header(stream, entry.file_size, f"{self.path}, {name}")
        else:
            shape, dtype = read_npy_header(self.path)
        return shape, str(dtype)

    def row(self, number: int) -> np.ndarray:
        """The values of a row; those of 16 bits in safetensors as float32."""
        if self.kind == "safetensors":
            values = self.file.get_slice(self.name)[number : number + 1][0]
            return np.asarray(values.float() if values.dtype.itemsize == 2 else values)
        if self.rows is None:
            path = self.unpack() if self.kind == "npz" else self.path
            self.rows = np.load(path, mmap_mode="r", allow_pickle=False)
        return np.array(self.rows[number])

    def labels(self) -> list[str] | None:
        """A label a row, as text; None where the file has none."""
        # Beside an array x, y is a place.
        name = self.first_of(LABELS[:-1] if "x" in self.names else LABELS)
        if name is None:
            return None
        values = self.small(name)
        if values.shape != self.shape[:1] or values.dtype.kind not in "iuUS":
            raise InputError(f"{self.path}: labels are {values.dtype} {values.shape}, the latents "
                             f"{self.shape[0]} rows")  # fmt: skip
        return as_text(values)

    def places(self) -> tuple[dict[str, list[Any]], list[str]]:
        """Slide, x and y of every row, and the names of the arrays that tell them.

        What is no array of text or whole numbers, one (of `coords` two) a row, is left.
        """
        columns: dict[str, list[Any]] = {}
        names = []
        for known, kinds, width in ((SLIDES, "iuUS", ()), (COORDS, "iu", (2,))):
            name = self.first_of(known)
            try:
                values = np.zeros(0) if name is None else self.small(name)
            except (InputError, TypeError):  # of objects, too large, or bfloat16
                continue
            if values.shape != (self.shape[0], *width) or values.dtype.kind not in kinds:
                continue
            if known is SLIDES:
                columns["slide"] = [text or None for text in as_text(values)]
            elif values.min() < 0 or values.max() > MAX_PLACE_PX:
                continue
            else:
                columns["x"], columns["y"] = values.T.tolist()
            names.append(str(name))
        return columns, names

    def first_of(self, known: Sequence[str]) -> str | None:
        return next((name for name in known if name in self.names), None)

    def small(self, name: str) -> np.ndarray:
        """A whole array beside the latents; InputError for one too large for that."""
        if self.kind == "safetensors":
            found: np.ndarray = self.file.get_tensor(name).numpy()
            return found
        shape, dtype = self.facts_of(name)
        if math.prod(shape) * np.dtype(dtype).itemsize > MAX_LABELS_BYTES:
            raise InputError(f"{self.path}: {name} {shape} of {dtype} are too large; refused")
        with self.file.open(f"{name}.npy") as stream:
            return np.asarray(np.load(stream, allow_pickle=False))

    def unpack(self) -> Path:
        """The array as a file of its own: compressed members cannot be read at any place."""
        self.unpacked = tempfile.TemporaryDirectory(prefix="latentds-")
        target = Path(self.unpacked.name) / "array.npy"
        entry = self.file.getinfo(f"{self.name}.npy")
        free = shutil.disk_usage(self.unpacked.name).free
        if entry.file_size > free * FREE_SHARE:
            raise InputError(
                f"{self.path}: unpacks to {entry.file_size} bytes, {target.parent.parent} has "
                f"{free} free; set TMPDIR to a larger disk"
            )
        try:
            with self.file.open(entry) as stream, naming(target), target.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{self.path}: damaged ({error}); fetch it anew") from error
        return target

    def close(self) -> None:
        if self.kind == "npz":
            self.file.close()
        if self.unpacked is not None:
            self.unpacked.cleanup()


def as_text(values: np.ndarray) -> list[str]:
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]
