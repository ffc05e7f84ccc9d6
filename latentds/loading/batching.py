"""Which draws of an epoch a rank has in a batch: global batches, ranks, lanes, the epoch's end."""
# B patches of a rank's batch

from __future__ import annotations

import dataclasses

import numpy as np

LAST = ("pad", "drop", "repeat")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """Global batches of an epoch, and every rank's share of them: the same number for each rank.

    size          draws an epoch
    global_batch  draws a global batch; ranks divide it
    ranks         processes that share it
    last          what becomes of the last, smaller global batch: "pad" deals it out evenly, ranks
                  that lack one patch repeat the epoch's first and mark it as not valid; "drop"
                  leaves it out; "repeat" fills it up with the epoch's first patches
    lanes         stretches of the epoch that a global batch takes from side by side. With as many
                  lanes as nodes, each node reads a stretch of its own instead of every pack.
    """

    size: int
    global_batch: int
    ranks: int = 1
    last: str = "pad"
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.last not in LAST:
            raise ValueError(f"last={self.last!r}; one of {', '.join(LAST)}")
        if self.global_batch < 1 or self.global_batch % self.ranks:
            raise ValueError(
                f"global_batch_size={self.global_batch} is not a multiple of {self.ranks} ranks; "
                "any number of ranks that divides it will do"
            )
        if self.lanes < 1 or self.global_batch % self.lanes:
            raise ValueError(
                f"lanes={self.lanes}; must divide global_batch_size={self.global_batch}"
            )
        if not len(self):
            raise ValueError(
                f"{self.size} patches do not fill one global batch of {self.global_batch}; a "
                "smaller one, or last='pad' or 'repeat'"
            )

    def __len__(self) -> int:
        """Batches an epoch, on every rank."""
        return self.full if self.last == "drop" else -(-self.size // self.global_batch)

    @property
    def full(self) -> int:
        """Global batches that need no patch twice."""
        return self.size // self.global_batch

    def stretches(self, batch: int, rank: int) -> list[tuple[int, int]]:
        """The draws of a rank's batch as [start, stop) stretches, padding included, in order."""
        share = self.global_batch // self.ranks
        if batch < self.full:
            return self.on_lanes(batch, rank * share, (rank + 1) * share)
        start, rest = self.full * self.global_batch, self.size - self.full * self.global_batch
        if self.last == "repeat":
            return self.wrap(start + rank * share, start + (rank + 1) * share)
        share = -(-rest // self.ranks)
        begin, end = rank * rest // self.ranks, (rank + 1) * rest // self.ranks
        padding = [(0, share - (end - begin))] if end - begin < share else []
        return [(start + begin, start + end), *padding] if end > begin else padding

    def valid(self, batch: int, rank: int) -> np.ndarray:
        """Whether each patch of a rank's batch counts, bool (B,): all but padding."""
        share = self.global_batch // self.ranks
        if batch < self.full or self.last == "repeat":
            return np.ones(share, bool)
        rest = self.size - self.full * self.global_batch
        own = (rank + 1) * rest // self.ranks - rank * rest // self.ranks
        return np.arange(-(-rest // self.ranks)) < own

    def on_lanes(self, batch: int, begin: int, end: int) -> list[tuple[int, int]]:
        """The places [begin, end) of a full global batch, as stretches of the epoch."""
        width = self.global_batch // self.lanes
        stretches = []
        for lane in range(begin // width, -(-end // width)):
            first, last = max(begin, lane * width), min(end, (lane + 1) * width)
            offset = lane * self.full * width + batch * width - lane * width
            stretches.append((offset + first, offset + last))
        return stretches

    def wrap(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of the epoch repeated endlessly."""
        stretches = []
        while start < stop:
            place = start % self.size
            length = min(stop - start, self.size - place)
            stretches.append((place, place + length))
            start += length
        return stretches
