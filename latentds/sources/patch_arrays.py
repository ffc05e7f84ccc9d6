"""HDF5 files of patches as arrays: PCam's `x`, HEST's `img`, CLAM's `imgs`; labels beside them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from latentds.core.display import number_of
from latentds.core.storage import check_regular, expands_to
from latentds.errors import InputError, Reason, UnusableError, missing_extra
from latentds.sources.csv_tables import read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.names import COLUMNS, fields_of, note_columns, numbers_of, splits_of
from latentds.sources.picture import MIXED_CHUNKS, Header, Listing, Picture
from latentds.sources.picture_files import PicturesInFiles
from latentds.sources.slide_names import some
from latentds.sources.source import Inspection, Kept, Source

SUFFIXES = (".h5", ".hdf5")
ARRAYS = ("x", "img", "imgs", "images")  # of patches, uint8 (N, H, W, 3)
LABELS = ("y", "label", "labels")  # integers (N, ...) of one value each
PLACES = "coords"  # integers (N, 2), at level 0
OF_ARRAY, OF_LABELS, OF_TABLE = "_x", "_y", "_meta.csv"  # PCam's files, how their names end
BLOCK_BYTES = 1 << 23  # of patches that are read at once
BLOCKS_KEPT = 2 * MIXED_CHUNKS
MAX_ROWS = 10**8
# Resolution of sets that their names tell and their files do not.
KNOWN_MPP = {"camelyonpatch_level_2": 0.972}  # github.com/basveeling/pcam: 10x of 40x, 4 * 0.243
# PCam's coord_x and coord_y: of which level, and whether of a corner, is written nowhere.
UNCLEAR = ("coord_x", "coord_y")


class Shape(NamedTuple):
    """An array of patches: its data set's name, (N, H, W, 3), and rows that are read at once."""

    name: str
    rows: int
    size_px: tuple[int, int]
    block: int


class PatchArrays(PicturesInFiles):
    """Every *.h5 of a folder that has an array of patches, or one. A source is `file.h5/row`.

    Labels are `y` or `labels`, in the same file or in NAME_y.h5 beside NAME_x.h5; what
    NAME_meta.csv says, a row a patch, is taken as a record's. `coords` beside an array are its
    corners, and its file is its slide. Splits are those of names. Blocks of rows are read, never a
    whole array.
    """

    kind = "HDF5 arrays of patches"
    marks = frozenset(SUFFIXES)

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options, files)
        self.shapes: dict[str, Shape] = {}
        self.blocks: Kept[np.ndarray] = Kept(BLOCKS_KEPT)
        self.unused: set[str] = set()

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        if not (found.is_open or found.is_file):
            return None
        paths = [found.root.name] if found.is_file else found.paths
        files = [path for path in paths if PurePosixPath(path).suffix.lower() in SUFFIXES]
        if not files or (found.is_folder and (found.kinds.pictures or found.kinds.slides)):
            return None
        root = found.root.parent if found.is_file else found.root
        arrays = [path for path in files if shape_in(root / path) is not None]
        if not arrays:
            if found.is_file:
                raise no_array(found.root)
            return None
        source = cls(found.options, arrays)
        source.notes = note_others(paths, arrays) if found.is_folder else ()
        return source

    def listing(self) -> Listing:
        files = splits_of(self.root, list(self.files), self.options.split_folders)
        pictures = [p for file, split in files.splits.items() for p in self.rows_of(file, split)]
        notes = (*files.notes, *note_columns(self.unused))
        return self.named(Listing(tuple(pictures), notes=notes))

    def rows_of(self, file: str, split: str) -> Iterator[Picture]:
        shape, path = self.shape(file), self.root / file
        labels = read_labels(path, shape.rows) if self.options.labels else None
        self.unused |= set(names_in(path)) - {shape.name, PLACES, *LABELS}
        shared = {"mpp": next((mpp for name, mpp in KNOWN_MPP.items() if name in file), None)}
        for row, fields in enumerate(self.facts_of(path, shape.rows)):
            own = {"label": labels[row]} if labels else {}
            yield Picture(f"{file}/{row}", split, **(shared | fields | own))

    def facts_of(self, path: Path, rows: int) -> Iterator[dict[str, Any]]:
        """What the table beside an array, or places in it, say of every row."""
        table = Path(f"{path_stem(str(path))}{OF_TABLE}")
        if table.is_file():
            yield from self.table_rows(table, rows)
            return
        places = read_integers(path, PLACES, rows, 2)
        for row in range(rows):
            if places is None:
                yield {}
                continue
            corner = {"x": str(places[row, 0]), "y": str(places[row, 1])}
            yield {"slide": path.stem} | numbers_of(f"{path}, row {row}", corner)

    def table_rows(self, path: Path, rows: int) -> Iterator[dict[str, Any]]:
        """Fields by row of a table; its labels are not read, the array's own count."""
        table = read_table(path)
        if len(table.rows) != rows:
            raise InputError(
                f"{path}: {number_of(len(table.rows), 'row')} for "
                f"{number_of(rows, 'patch', 'patches')}; fetch it anew"
            )
        read = [name for name in table.columns if name in COLUMNS and name not in UNCLEAR]
        self.unused |= set(table.columns) - set(read)
        for line, row in zip(table.lines, table.rows, strict=True):
            try:
                yield fields_of({name: row[name] for name in read}, use_labels=False)
            except InputError as error:
                raise InputError(f"{path}, line {line}: {error}") from error

    def shape(self, file: str) -> Shape:
        """An array's shape, looked at once."""
        if file not in self.shapes:
            shape = shape_in(self.root / file)
            if shape is None:
                raise UnusableError("has no array of patches any more", "changed")
            self.shapes[file] = shape
        return self.shapes[file]

    def chunk(self, picture: Picture) -> str | None:
        file, row = self.row_of(picture)
        return f"{file}/{row // self.shape(file).block}"

    def header(self, picture: Picture) -> Header:
        size_px = self.shape(self.row_of(picture)[0]).size_px
        header = Header(size_px, "RGB", "raw", math.prod(size_px) * 3)
        self.check_tile(header)
        return header

    def file(self, picture: Picture) -> BinaryIO:
        """A patch as a file that Pillow opens."""
        file, row = self.row_of(picture)
        shape = self.shape(file)
        number, place = divmod(row, shape.block)
        block = self.blocks.get(
            f"{file}/{number}", lambda: read_block(self.root / file, shape, number)
        )
        height, width = shape.size_px
        return io.BytesIO(b"P6 %d %d 255\n" % (width, height) + block[place].tobytes())


def note_others(paths: Sequence[str], arrays: Sequence[str]) -> tuple[str, ...]:
    """That other files of a folder are not read, for people."""
    ends = (OF_TABLE, *(f"{OF_LABELS}{suffix}" for suffix in SUFFIXES))
    beside = {f"{path_stem(path)}{end}" for path in arrays for end in ends}
    others = [path for path in paths if path not in beside.union(arrays)]
    return (f"not read: {some(others)}",) if others else ()


def path_stem(path: str) -> str:
    """What the names of an array's file and of those beside it have in common."""
    return str(PurePosixPath(path).with_suffix("")).removesuffix(OF_ARRAY)


def open_h5(path: Path, reason: Reason = "unreadable") -> Any:
    """An HDF5 file, open for reading; InputError (without the name) where it cannot be read."""
    try:
        import h5py
    except ImportError as error:
        raise missing_extra("h5py", "slides") from error
    check_regular(path)
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UnusableError(f"is no readable h5 file ({type(error).__name__})", reason) from error


def own_dataset(file: Any, name: str) -> Any:
    """A data set of that name inside the file itself, None where there is none.

    Links and external storage would read files that were not asked for.
    """
    import h5py

    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        return None
    return found


def shape_in(path: Path) -> Shape | None:
    """The array of patches in a file, None where it has none or cannot be read.

    raises  InputError for one that takes memory which the file does not have
    """
    try:
        with open_h5(path) as file:
            for name in ARRAYS:
                array = own_dataset(file, name)
                if array is None or array.dtype != np.uint8 or array.shape[3:] != (3,):
                    continue
                if wrong := expands_to(array, path):
                    raise InputError(f"{path}: {name!r} {wrong}")
                rows, height, width = array.shape[:3]
                if not 0 < rows <= MAX_ROWS or not height or not width:
                    continue
                return Shape(name, rows, (height, width), block_rows(array))
    except UnusableError:
        return None
    return None


def no_array(path: Path) -> InputError:
    """The error of a file without an array of patches, with what it has at its top."""
    try:
        with open_h5(path) as file:
            found = ((name, own_dataset(file, name)) for name in file)
            there = [f"{name} {array.dtype} {array.shape}" for name, array in found
                     if array is not None]  # fmt: skip
    except UnusableError as error:
        return InputError(f"{path}: {error}; fetch it anew")
    return InputError(
        f"{path}: no array of patches, uint8 (N, H, W, 3), called {', '.join(ARRAYS)}; it has "
        f"{some(there) or 'no array'}; rename or convert one"
    )


def block_rows(array: Any) -> int:
    """Rows that are read at once: whole chunks of the file, at most BLOCK_BYTES where that fits."""
    chunk = array.chunks[0] if array.chunks else 1
    fitting = BLOCK_BYTES // math.prod(array.shape[1:])
    return int(max(fitting // chunk, 1) * chunk)


def read_block(path: Path, shape: Shape, number: int) -> np.ndarray:
    """Rows of a block; InputError (without the name) where they cannot be read."""
    try:
        with open_h5(path) as file:
            start = number * shape.block
            rows: np.ndarray = own_dataset(file, shape.name)[start : start + shape.block]
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise UnusableError(f"cannot be read ({type(error).__name__})", "unreadable") from error
    return rows


def read_labels(path: Path, rows: int) -> list[str] | None:
    """Class numbers of an array's rows as names, from the file or the one beside it; else None."""
    beside = Path(f"{path_stem(str(path))}{OF_LABELS}{path.suffix}")
    for file in filter(Path.is_file, (path, beside)):
        for name in LABELS:
            if (found := read_integers(file, name, rows, 1)) is not None:
                return [str(number) for number in found[:, 0].tolist()]
    return None


def names_in(path: Path) -> list[str]:
    """What a file has at its top."""
    with open_h5(path) as file:
        return list(file)


def read_integers(path: Path, name: str, rows: int, width: int) -> np.ndarray | None:
    """A data set of integers as (rows, width), None where there is none of that name.

    raises  InputError where it is something else, or of other rows
    """
    with open_h5(path) as file:
        import h5py

        found = own_dataset(file, name)
        if found is None:
            return None
        is_fit = found.dtype.kind in "iub" and found.size == rows * width and len(found) == rows
        if not is_fit:
            other = "" if name == PLACES else ", or pass --no-labels"
            # Texts may take memory that the file does not have: many rows share one.
            what = "text" if h5py.check_string_dtype(found.dtype) else found.dtype
            raise InputError(
                f"{path}: {name!r} is {what} {found.shape}, not whole numbers for {rows:,} "
                f"patches; write {rows * width:,} whole numbers{other}"
            )
        values: np.ndarray = found[:].astype(np.int64).reshape(rows, width)
    return values
