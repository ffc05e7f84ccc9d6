"""Feature files: features and coordinates of one slide in HDF5, written in a stream, read in part.

The layout is TRIDENT's: datasets `features` (N, D) and `coords` (N, 2), a row a chunk, growable.
"""
# N patches of a slide, n of a part, D embedding dimensions

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentds.core.storage import check_regular, expands_to, naming, rename_durably
from latentds.errors import FormatError, InputError, first_words, missing_extra

FEATURES, COORDS = "features", "coords"
BLOCK_ROWS = 1024  # HDF5 takes 6 KB a chunk that it moves at once, and here a chunk is a row
MAX_DIM, MAX_ROWS = 1 << 20, 10**9  # beyond them a header is taken to be damaged
Attributes = Mapping[str, Mapping[str, Any]]  # dataset: its attributes


class HeldBackErrors(io.FileIO):
    """A file for h5py to write to, which keeps a failed write's error for `check` to raise.

    Told of a full disk, HDF5 2.0 cannot close its file and ends the process with a segmentation
    fault at its exit. So what comes after the first error is dropped without a word, HDF5 closes
    its file, and whoever writes asks `check` before and after that.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self.path = path
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of it, or note why not."""
        view = memoryview(content).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Cut or extend the file, or note why not."""
        try:
            return super().truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def check(self) -> None:
        """Raise the error of the first write that failed."""
        if self.error is not None:
            with naming(self.path):
                raise self.error


def write_features(
    files: Mapping[Path, tuple[slice, Attributes]], chunks: Iterable[tuple[np.ndarray, np.ndarray]]
) -> int:
    """Write a slide's feature files and return N; each appears whole or not at all.

    files   the dimensions that each has of the features, and the attributes of `features` and of
            `coords` there
    chunks  (features float (n, D), coords int64 (n, 2)) of the slide's parts, one at a time
    raises  InputError for no patch at all; OSError for a full disk; what `chunks` raises
    """
    with contextlib.ExitStack() as opened:
        places = [(*opened.enter_context(new_file(path)), *own) for path, own in files.items()]
        rows = 0
        for features, coords in chunks:
            for file, sink, dimensions, attributes in places:
                for name, part in ((FEATURES, features[:, dimensions]), (COORDS, coords)):
                    append(file, name, part, attributes.get(name, {}))
                sink.check()
            rows += len(features)
        if not rows:
            raise InputError(f"{next(iter(files)).stem}: no patch; an empty bag is not written")
    return rows


def write_coordinates(path: Path, coords: np.ndarray, attributes: Mapping[str, Any]) -> None:
    """Write a file of coordinates alone, int64 (N, 2) with attributes, atomically."""
    with new_file(path) as (file, _):
        append(file, COORDS, coords, attributes)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[tuple[Any, HeldBackErrors]]:
    """An h5py file that takes the name `path` when the block ends well, and is gone otherwise."""
    h5py = load_h5py()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    with naming(temporary):
        sink = HeldBackErrors(temporary)
    try:
        with sink:
            try:
                with h5py.File(sink, "w") as file:
                    yield file, sink
            finally:
                sink.check()  # what else went wrong came of it
            os.fsync(sink.fileno())
        rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append(file: Any, name: str, part: np.ndarray, attributes: Mapping[str, Any]) -> None:
    """Add rows to a dataset, which the first of them make."""
    if name not in file:
        shape = part.shape[1:]
        dataset = file.create_dataset(
            name, (0, *shape), part.dtype, maxshape=(None, *shape), chunks=(1, *shape)
        )
        for key, value in attributes.items():
            dataset.attrs[key] = value
    dataset = file[name]
    for start in range(0, len(part), BLOCK_ROWS):
        block = part[start : start + BLOCK_ROWS]
        dataset.resize(len(dataset) + len(block), axis=0)
        dataset[len(dataset) - len(block) :] = block


class FeatureFile:
    """A feature file open for reading, ours or another tool's, (1, N, D) too; a context manager.

    raises  FormatError (with the path) for what is no such file: truncated, or features that are
            no float (N, D), or coordinates that are no (N, 2) of whole numbers
    """

    def __init__(self, path: Path) -> None:
        h5py = load_h5py()
        self.path = path
        check_regular(path, str(path))
        try:
            self.file = h5py.File(path, "r")
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            self._features = self.dataset(FEATURES)
            self._coords = self.dataset(COORDS) if COORDS in self.file else None
            self.check()
        except BaseException:
            self.file.close()
            raise

    def dataset(self, name: str) -> Any:
        """A dataset that lies in this very file: links would read files nobody asked for."""
        import h5py

        try:
            if not isinstance(self.file.get(name, getlink=True), h5py.HardLink):
                raise FormatError(f"{self.path}: has no dataset {name!r} of its own")
            found = self.file[name]
            if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
                raise FormatError(f"{self.path}: {name!r} does not lie in this file; refused")
        except (OSError, KeyError, RuntimeError) as error:
            raise unreadable(self.path, error) from error
        return found

    def check(self) -> None:
        shape, dtype = rows_of(self._features), self._features.dtype
        if dtype.kind != "f" or len(shape) != 2 or not 0 < shape[1] <= MAX_DIM:
            raise FormatError(
                f"{self.path}: 'features' is {dtype} {shape}, not floats (N, D), a patch a row"
            )
        for dataset in [part for part in (self._features, self._coords) if part is not None]:
            if wrong := expands_to(dataset, self.path):
                raise FormatError(f"{self.path}: {dataset.name} {wrong}")
        if shape[0] > MAX_ROWS:
            raise FormatError(f"{self.path}: 'features' has {shape[0]} rows; refused")
        if self._coords is not None and (
            self._coords.dtype.kind not in "iu" or rows_of(self._coords) != (shape[0], 2)
        ):
            raise FormatError(
                f"{self.path}: 'coords' is {self._coords.dtype} {self._coords.shape}, not whole "
                f"numbers {(shape[0], 2)} as its features have rows"
            )

    @property
    def dim(self) -> int:
        return int(self._features.shape[-1])

    def __len__(self) -> int:
        return int(self._features.shape[-2])

    def features(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Features float32 (n, D) of the rows asked for, in their order; no others are read."""
        return self.read(self._features, rows).astype(np.float32, copy=False)

    def coords(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Coordinates int64 (n, 2) at level 0; -1 where the file has none."""
        if self._coords is None:
            return np.full((len(np.arange(len(self))[rows]), 2), -1, np.int64)
        return self.read(self._coords, rows).astype(np.int64, copy=False)

    def read(self, dataset: Any, rows: np.ndarray | slice) -> np.ndarray:
        """Rows of a dataset, a block at a time; h5py takes ascending ones without repetitions."""
        wanted, places = np.unique(np.arange(len(self))[rows], return_inverse=True)
        found = np.empty((len(wanted), dataset.shape[-1]), dataset.dtype)
        try:
            for start in range(0, len(wanted), BLOCK_ROWS):
                block = wanted[start : start + BLOCK_ROWS]
                is_run = block[-1] - block[0] == len(block) - 1
                chosen = slice(block[0], block[-1] + 1) if is_run else block
                where = (0, chosen) if dataset.ndim > 2 else chosen
                found[start : start + len(block)] = dataset[where]
        except (OSError, RuntimeError) as error:
            raise unreadable(self.path, error) from error
        return found if isinstance(rows, slice) and (rows.step or 1) > 0 else found[places]

    @property
    def attributes(self) -> dict[str, dict[str, Any]]:
        found = {FEATURES: self._features, COORDS: self._coords}
        return {name: dict(part.attrs) for name, part in found.items() if part is not None}

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def rows_of(dataset: Any) -> tuple[int, ...]:
    """Its shape, without the axis of length 1 that files of a batch of one bag have before rows."""
    shape = tuple(dataset.shape)
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def unreadable(path: Path, error: Exception) -> FormatError:
    """What h5py says of a damaged file, with its name."""
    reason = first_words(error, 160)
    return FormatError(f"{path}: no whole HDF5 file ({reason}); remove it and make it again")


def load_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise missing_extra("h5py", "evaluate") from error
    return h5py
