"""Which shards of a conversion wait, rest and are done, and what their journals say so far."""

from __future__ import annotations

import logging
import time
from collections import deque

import torch

from latentds.conversion.conversion_plan import PlannedShard, check_budget
from latentds.conversion.left_out import LeftOut, by_region
from latentds.conversion.prepared import Conversion
from latentds.conversion.workdir import look_at_journal
from latentds.errors import InputError, LatentdsError

logger = logging.getLogger(__name__)
MAX_DEATHS = 3  # of workers at one block of a shard
REST_S = 2.0  # before a shard whose worker died is handed out again, times its deaths
LESS_MEMORY = (
    "lower --workers, let a worker take more of a node (--cpus-per-worker), or start anew with a "
    "lower --encode-batch and --overwrite"
)


class Ledger:
    """The shards that are left, and an account of all.

    waiting  shards to be handed out
    resting  (time, shard) of those whose worker died, until then
    deaths   block a shard's last worker died at, and how many died there
    patches  durable ones, by shard; bad  what is left out of all shards
    """

    def __init__(self, conversion: Conversion) -> None:
        self.work, self.config = conversion.work, conversion.config
        self.bad = by_region(conversion.plan.bad)
        self.patches: dict[str, int] = {}
        self.deaths: dict[str, tuple[int, int]] = {}
        self.resting: list[tuple[float, PlannedShard]] = []
        self.waiting: deque[PlannedShard] = deque()
        for shard in conversion.shards:
            self.look_at(shard)
            if not self.work.index(shard.name).is_file():
                self.waiting.append(shard)

    @property
    def has_more(self) -> bool:
        """Whether there is a shard that nobody works on."""
        return bool(self.waiting or self.resting)

    @property
    def total(self) -> int:
        """Patches that are durable."""
        return sum(self.patches.values())

    def wake(self) -> None:
        """Let shards that rested long enough be handed out."""
        now = time.monotonic()
        self.waiting.extend(shard for until, shard in self.resting if until <= now)
        self.resting = [(until, shard) for until, shard in self.resting if until > now]

    def look_at(self, shard: PlannedShard) -> int:
        """Blocks of a shard that are durable; they and its bad pictures are accounted for."""
        blocks, bad = look_at_journal(self.work.journal_path(shard.name))
        self.bad |= by_region(bad)
        self.patches[shard.name] = patches_of(shard, blocks)
        return blocks

    def note_done(self, shard: PlannedShard, bad: list[LeftOut]) -> None:
        """Account for a finished shard; `look_at` might see an older journal on another node."""
        self.bad |= by_region(bad)
        self.patches[shard.name] = patches_of(shard)

    def check_budget(self) -> None:
        """Raise once more pictures are bad, over all shards, than --max-bad allows."""
        check_budget(self.config, self.bad.values())

    def note_death(self, shard: PlannedShard, why: str) -> None:
        """Let a shard rest whose worker died; InputError where every worker dies of it."""
        blocks, (last, count) = self.look_at(shard), self.deaths.get(shard.name, (-1, 0))
        count = count + 1 if last == blocks else 1  # the one before came less far: no sign yet
        self.deaths[shard.name] = (blocks, count)
        where = f"at block {blocks + 1} of {len(shard.blocks)} of {shard.name}"
        check_deaths(count, where, why)
        logger.warning("a worker was lost %s: %s; another goes on", where, why)
        self.resting.append((time.monotonic() + REST_S * count, shard))


def patches_of(shard: PlannedShard, blocks: int | None = None) -> int:
    """Candidates in a shard's first blocks, all by default."""
    return sum(stop - start for start, stop in shard.blocks[:blocks])


def check_deaths(count: int, where: str, why: str) -> None:
    """InputError once so many workers died at one place that the next would too."""
    if count >= MAX_DEATHS:
        raise InputError(
            f"{count} workers were lost {where}; the last: {why}. If memory ran out, "
            f"{LESS_MEMORY}. What is finished is kept"
        )


def told(cause: object, shard: PlannedShard | None) -> Exception | None:
    """What a worker raised, as if raised here; None for what is no error of the user's."""
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        where = shard.name if shard else "a worker"
        return InputError(f"{where}: out of memory; {LESS_MEMORY}. What is finished is kept")
    return cause if isinstance(cause, LatentdsError | OSError) else None
