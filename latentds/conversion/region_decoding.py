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
from latentds.store.patch_record import Patch

TASK_REGIONS = 4  # of a slide or tiled picture a thread reads at a time
CHUNKS_AHEAD = 3  # decoded and waiting: memory is a few encode batches of pixels
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)

Outcome = Patch | LeftOut


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


class PatchReader:
    """Reads the regions of a plan.

    Chunks come in the order asked for, whatever the number of threads.
    """

    def __init__(
        self, plan: Plan, config: ConvertConfig, workers: int, ahead: int = CHUNKS_AHEAD
    ) -> None:
        self.plan, self.config, self.ahead = plan, config, ahead
        self.hide = Anonymizer(config.anonymize) if config.anonymize else None
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
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

    def submit(self, rows: np.ndarray) -> list[Future[list[Outcome]]]:
        """One task for a few regions of one picture."""
        regions = self.plan.regions[rows]
        edges = np.flatnonzero(np.diff(regions["picture"].astype(np.int64))) + 1
        runs = np.split(regions, edges)
        parts = [
            run[i : i + TASK_REGIONS] for run in runs for i in range(0, len(run), TASK_REGIONS)
        ]
        return [self.pool.submit(self.read, part) for part in parts]

    def collate(self, tasks: list[Future[list[Outcome]]]) -> Chunk:
        """The chunk of a list of tasks, pixels in one array."""
        outcomes = [outcome for task in tasks for outcome in task.result()]
        patches = [outcome for outcome in outcomes if isinstance(outcome, Patch)]
        bad = by_region(outcome for outcome in outcomes if isinstance(outcome, LeftOut))
        pixels = np.zeros((len(patches), *self.plan.patch_px, 3), np.uint8)
        for place, patch in enumerate(patches):
            pixels[place] = patch.image
        return Chunk([dataclasses.replace(p, image=NO_PIXELS) for p in patches], pixels, bad)

    def read(self, regions: np.ndarray) -> list[Outcome]:
        """The patches of regions of one picture."""
        number, plan = int(regions["picture"][0]), self.plan
        picture, places = plan.pictures[number], [(int(r["x"]), int(r["y"])) for r in regions]
        try:
            found = plan.source.read(picture, plan.headers[number], plan.patch_px, places)
            return [*(found if self.hide is None else map(self.hidden, found))]
        except (InputError, OSError) as error:
            bad = record_of(picture.source, places[0], error)
        if len(regions) > 1:  # the others may be sound: what is left out does not depend on batches
            return [outcome for row in range(len(regions))
                    for outcome in self.read(regions[row : row + 1])]  # fmt: skip
        return [bad]

    def hidden(self, patch: Patch) -> Patch:
        """A patch without the names it came from."""
        assert self.hide is not None
        slide = None if patch.slide is None else self.hide(patch.slide)
        return dataclasses.replace(patch, slide=slide, source=self.hide(patch.source))

    def close(self) -> None:
        """Stop the threads; what is waiting is dropped."""
        for pool in (self.pool, self.collator):
            pool.shutdown(wait=True, cancel_futures=True)
