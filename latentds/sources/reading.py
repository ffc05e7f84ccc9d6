"""Headers and patches of a source's pictures, read in threads: the one reader of originals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from latentds.errors import InputError, UnusableError
from latentds.sources.picture import Header, Picture
from latentds.sources.source import Source
from latentds.store.patch_record import Patch

HEADERS_AT_ONCE = 4096  # a task is larger than a header
TASK_REGIONS = 4  # of a picture or slide that a thread reads at a time

Regions = Sequence[tuple[int, int]]


class PatchReader:
    """Reads for whoever wants pixels: conversions, patch sets, originals of a data set.

    What cannot be read is an InputError in its place, which does not name the picture: `of_file`
    does. The order is that asked for, whatever the number of threads.
    """

    def __init__(self, source: Source, workers: int) -> None:
        self.source = source
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="originals")

    def headers(self, pictures: Sequence[Picture]) -> Iterator[Header | InputError]:
        """The header of every picture, or why it has none."""
        for start in range(0, len(pictures), HEADERS_AT_ONCE):
            yield from self.pool.map(self.header, pictures[start : start + HEADERS_AT_ONCE])

    def header(self, picture: Picture) -> Header | InputError:
        """A picture's header, or why it has none."""
        try:
            return self.source.header(picture)
        except (InputError, OSError) as error:
            return without_name(error)

    def submit(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> Future[list[Patch | InputError]]:
        """What `read` will return."""
        return self.pool.submit(self.read, picture, header, patch_px, regions)

    def read(
        self, picture: Picture, header: Header, patch_px: tuple[int, int], regions: Regions
    ) -> list[Patch | InputError]:
        """The patch at every region, or why there is none: what is sound is not lost to others."""
        try:
            found = self.source.read(picture, header, patch_px, regions)
            return [*checked(found, len(regions), patch_px)]
        except (InputError, OSError) as error:
            if len(regions) == 1:
                return [without_name(error)]
        return [one for at in regions for one in self.read(picture, header, patch_px, [at])]

    def close(self) -> None:
        """Stop the threads; what is waiting is dropped."""
        self.pool.shutdown(wait=True, cancel_futures=True)


def checked(patches: list[Patch], count: int, patch_px: tuple[int, int]) -> list[Patch]:
    """Patches as many and as large as were asked for; UnusableError where they are not."""
    if len(patches) != count:
        raise UnusableError(f"{len(patches)} patches where {count} were asked for", "other")
    for patch in patches:
        (height, width), wanted = patch.image.shape[:2], f"{patch_px[1]}x{patch_px[0]}"
        if (height, width) != patch_px:
            raise UnusableError(f"{width}x{height} px, no patch of {wanted} px", "changed")
    return patches


def without_name(error: InputError | OSError) -> InputError:
    """An error as one of a picture's, without the name that the file system's has."""
    if isinstance(error, OSError):
        return UnusableError(f"cannot be read ({error.strerror or error})")
    return error


def of_file(path: object, error: InputError) -> InputError:
    """The error with the name of the picture."""
    return InputError(f"{path}: {error}")


def tasks_of(numbers: np.ndarray) -> list[np.ndarray]:
    """Places of an array of picture numbers, a few of one picture at a time: a thread's tasks."""
    edges = np.flatnonzero(np.diff(numbers.astype(np.int64))) + 1
    runs = np.split(np.arange(len(numbers)), edges)
    return [run[i : i + TASK_REGIONS] for run in runs for i in range(0, len(run), TASK_REGIONS)]
