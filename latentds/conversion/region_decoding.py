"""Planned regions to patches, in threads, ahead of the encoder and never far ahead."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from latentds.conversion.conversion_plan import Plan
from latentds.conversion.convert_config import ConvertConfig
from latentds.conversion.left_out import LeftOut, Region, by_region, record_of
from latentds.errors import InputError
from latentds.sources.anonymity import Anonymizer
from latentds.sources.reading import PatchReader, tasks_of
from latentds.store.patch_record import Patch

CHUNKS_AHEAD = 3  # decoded and waiting: memory is a few encode batches of pixels
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)

# A source, some of its regions, and what became of each.
Task = tuple[str, list[tuple[int, int]], Future[list[Patch | InputError]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """What became of a stretch of regions.

    patches  the readable ones, their `image` emptied
    pixels   uint8 (N, H, W, 3), their images
    bad      the others
    """

    patches: list[Patch]
    pixels: np.ndarray
    bad: dict[Region, LeftOut]


class PlanReader:
    """Reads the regions of a plan.

    Chunks come in the order asked for, whatever the number of threads.
    """

    def __init__(
        self, plan: Plan, config: ConvertConfig, workers: int, ahead: int = CHUNKS_AHEAD
    ) -> None:
        self.plan, self.config, self.ahead = plan, config, ahead
        self.hide = Anonymizer(config.anonymize) if config.anonymize else None
        self.reader = PatchReader(plan.source, workers)
        self.collator = ThreadPoolExecutor(1, thread_name_prefix="collate")

    def chunks(self, groups: Iterable[np.ndarray]) -> Iterator[Chunk]:
        """What became of the plan's regions at every group of rows, reading ahead."""
        waiting: deque[Future[Chunk]] = deque()
        for rows in groups:
            waiting.append(self.collator.submit(self.collate, self.submit(rows)))
            if len(waiting) > self.ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def submit(self, rows: np.ndarray) -> list[Task]:
        """A few regions of one picture a task."""
        regions, plan = self.plan.regions[rows], self.plan
        tasks = []
        for places in tasks_of(regions["picture"]):
            part = regions[places]
            number, at = int(part["picture"][0]), [(int(r["x"]), int(r["y"])) for r in part]
            picture, header = plan.pictures[number], plan.headers[number]
            future = self.reader.submit(picture, header, plan.patch_px, at)
            tasks.append((picture.source, at, future))
        return tasks

    def collate(self, tasks: list[Task]) -> Chunk:
        """The chunk of a list of tasks, pixels in one array."""
        patches, bad = list[Patch](), list[LeftOut]()
        for source, places, future in tasks:
            for place, outcome in zip(places, future.result(), strict=True):
                if isinstance(outcome, Patch):
                    patches.append(outcome)
                else:
                    bad.append(record_of(source, place, outcome))
        pixels = np.zeros((len(patches), *self.plan.patch_px, 3), np.uint8)
        for row, patch in enumerate(patches):
            pixels[row] = patch.image
        return Chunk([self.stored(patch) for patch in patches], pixels, by_region(bad))

    def stored(self, patch: Patch) -> Patch:
        """A patch without its pixels, and without the names it came from where they are hidden."""
        if self.hide is None:
            return dataclasses.replace(patch, image=NO_PIXELS)
        slide = None if patch.slide is None else self.hide(patch.slide)
        source = self.hide(patch.source)
        return dataclasses.replace(patch, image=NO_PIXELS, slide=slide, source=source)

    def close(self) -> None:
        """Stop the threads; what is waiting is dropped."""
        self.reader.close()
        self.collator.shutdown(wait=True, cancel_futures=True)
