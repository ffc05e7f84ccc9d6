"""Array files of others, read as untrusted: npy, npz and safetensors; sizes checked, no pickle."""
# N rows of a file

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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


class NpyHeader(NamedTuple):
    """What an npy header says, and the bytes that the whole file has by it."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int


def read_npy_header(path: Path) -> NpyHeader:
    """The header of an npy file whose content has just the bytes it announces."""
    with open_regular(path, str(path)) as file:
        header = parse_npy_header(file, str(path))
    if path.stat().st_size != header.size:
        raise InputError(
            f"{path}: {path.stat().st_size} bytes, its header announces {header.size} "
            f"({header.dtype} {header.shape}); truncated or damaged"
        )
    return header


def parse_npy_header(file: BinaryIO, where: str) -> NpyHeader:
    """The header at the start of a stream; InputError for anything but plain numbers."""
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
    return NpyHeader(tuple(shape), dtype, file.tell() + math.prod(shape) * dtype.itemsize)


def read_npy(path: Path) -> np.ndarray:
    read_npy_header(path)
    values: np.ndarray = np.load(path, allow_pickle=False)
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayFacts:
    """What an array file holds, nothing large read.

    rows    N
    shape   of a row
    dtype   as stored: float32, float16, bfloat16, uint8, ...
    name    of the array, empty for npy
    extras  arrays of the file that are not read
    """

    rows: int
    shape: tuple[int, ...]
    dtype: str
    name: str = ""
    extras: tuple[str, ...] = ()


def inspect_array(path: Path) -> ArrayFacts:
    """The facts of a file of rows; InputError where it is none."""
    if path.suffix == ".safetensors":
        return inspect_safetensors(path)
    if path.suffix == ".npz":
        return inspect_npz(path)
    header = read_npy_header(path)
    return facts_of(path, header.shape, str(header.dtype))


def facts_of(
    path: Path, shape: tuple[int, ...], dtype: str, name: str = "", names: Sequence[str] = ()
) -> ArrayFacts:
    """The facts, once it is sure that there are rows."""
    if len(shape) not in (2, 4) or min(shape) < 1:
        raise InputError(
            f"{path}: an array of shape {shape}; latents are (N, C, h, w), or "
            "(N, C*h*w) with --shape"
        )
    extras = tuple(other for other in names if other != name and other not in LABELS)
    return ArrayFacts(rows=shape[0], shape=shape[1:], dtype=dtype, name=name, extras=extras)


def inspect_safetensors(path: Path) -> ArrayFacts:
    check_regular(path, str(path))
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = choose_name(path, names)
            view = file.get_slice(name)
            shape, dtype = tuple(view.get_shape()), DTYPES.get(view.get_dtype())
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a safetensors file ({error}); fetch it anew") from error
    if dtype is None:
        raise InputError(f"{path}: {name} is {view.get_dtype()}; known: {', '.join(DTYPES)}")
    return facts_of(path, shape, dtype, name, names)


def inspect_npz(path: Path) -> ArrayFacts:
    """The facts of an npz file, from the header inside the archive."""
    with open_zip(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        name = choose_name(path, names)
        header = zipped_header(archive, path, name)
    return facts_of(path, header.shape, str(header.dtype), name, names)


def open_zip(path: Path) -> zipfile.ZipFile:
    check_regular(path, str(path))
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: not an npz file ({error}); fetch it anew") from error


def zipped_header(archive: zipfile.ZipFile, path: Path, name: str) -> NpyHeader:
    """The header of an array in an archive, whose size must be what the header announces."""
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as stream:
        header = parse_npy_header(stream, f"{path}, {name}")  # type: ignore[arg-type]
    if entry.file_size != header.size:
        raise InputError(
            f"{path}, {name}: {entry.file_size} bytes, its header announces {header.size}"
        )
    return header


def choose_name(path: Path, names: Sequence[str]) -> str:
    """Which array holds the latents; InputError where that is not clear."""
    known = [name for name in LATENTS if name in names]
    others = [name for name in names if name not in LABELS]
    if known or len(others) == 1:
        return known[0] if known else others[0]
    raise InputError(f"{path}: holds {sorted(names)}; the latents' array must be one of "
                     f"{', '.join(LATENTS)}, or the only one")  # fmt: skip


def read_labels(path: Path, rows: int) -> list[str] | None:
    """A label a row, as text; None where the file has none."""
    # Beside an array x, y is a place.
    found = read_array(path, LABELS[:-1] if "x" in names_in(path) else LABELS)
    if found is None:
        return None
    if found[1].shape != (rows,) or found[1].dtype.kind not in "iuUS":
        raise InputError(
            f"{path}: labels are {found[1].dtype} {found[1].shape}, the latents {rows} rows"
        )
    return as_text(found[1])


def read_columns(path: Path, rows: int) -> tuple[dict[str, list[Any]], tuple[str, ...]]:
    """Slide, x and y of every row, and the names of the arrays that tell them.

    What is no array of text or whole numbers, one (of `coords` two) a row, is left.
    """
    columns: dict[str, list[Any]] = {}
    names = []
    for known, kinds, width in ((SLIDES, "iuUS", ()), (COORDS, "iu", (2,))):
        try:
            found = read_array(path, known)
        except (InputError, TypeError):  # of objects, too large, or bfloat16
            continue
        if found is None or found[1].shape != (rows, *width) or found[1].dtype.kind not in kinds:
            continue
        name, values = found
        if known is SLIDES:
            columns["slide"] = [text or None for text in as_text(values)]
        elif values.min() < 0 or values.max() > MAX_PLACE_PX:
            continue
        else:
            columns["x"], columns["y"] = values.T.tolist()
        names.append(name)
    return columns, tuple(names)


def names_in(path: Path) -> list[str]:
    """Names of a file's arrays; none of npy."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    if path.suffix != ".npz":
        return []
    with open_zip(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def read_array(path: Path, known: Sequence[str]) -> tuple[str, np.ndarray] | None:
    """The first of some arrays that a file has, and its name; None where it has none of them."""
    there = names_in(path)
    name = next((name for name in known if name in there), None)
    if name is None:
        return None
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            return name, file.get_tensor(name)
    with open_zip(path) as archive:
        header = zipped_header(archive, path, name)
        if header.size > MAX_LABELS_BYTES:
            shape = f"{header.shape} of {header.dtype}"
            raise InputError(f"{path}: {name} {shape} are too large; refused")
        return name, np.load(archive.open(f"{name}.npy"), allow_pickle=False)


def as_text(values: np.ndarray) -> list[str]:
    """Numbers and names as text."""
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values.tolist()]


class ArrayRows:
    """Rows of an array file, any of them in any order; `close` deletes what was unpacked."""

    def __init__(self, path: Path, facts: ArrayFacts) -> None:
        self.unpacked: tempfile.TemporaryDirectory[str] | None = None
        self.read: Callable[[int], np.ndarray]
        if path.suffix == ".safetensors":
            self.read = self.open_safetensors(path, facts.name)
            return
        if path.suffix == ".npz":
            path = self.unpack(path, facts.name)
        read_npy_header(path)
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
        self.read = lambda row: np.array(rows[row])

    def open_safetensors(self, path: Path, name: str) -> Callable[[int], np.ndarray]:
        """A function that reads one row, bfloat16 as float32."""
        view = safe_open(path, framework="pt").get_slice(name)  # type: ignore[no-untyped-call]

        def read(row: int) -> np.ndarray:
            values = view[row : row + 1][0]
            whole: np.ndarray = (values.float() if values.dtype.itemsize == 2 else values).numpy()
            return whole

        return read

    def unpack(self, path: Path, name: str) -> Path:
        """The array as a file of its own: compressed members cannot be read at any place."""
        self.unpacked = tempfile.TemporaryDirectory(prefix="latentds-")
        target = Path(self.unpacked.name) / "array.npy"
        with open_zip(path) as archive:
            entry = archive.getinfo(f"{name}.npy")
            free = shutil.disk_usage(self.unpacked.name).free
            if entry.file_size > free * FREE_SHARE:
                raise InputError(
                    f"{path}: unpacks to {entry.file_size} bytes, {target.parent.parent} has "
                    f"{free} free; set TMPDIR to a larger disk"
                )
            try:
                with archive.open(entry) as stream, naming(target), target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise InputError(f"{path}: damaged ({error}); fetch it anew") from error
        return target

    def close(self) -> None:
        if self.unpacked is not None:
            self.unpacked.cleanup()
