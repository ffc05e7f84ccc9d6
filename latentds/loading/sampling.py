"""Draws by weight: of several sets, or of every label, slide or patient alike; pure functions."""
# D draws

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latentds.core.randomness import key_of, permute, shuffled
from latentds.errors import InputError
from latentds.loading.order import Drawn, PackSampler, join
from latentds.loading.selection import named_patients, names_of
from latentds.store.reader import ShardSet

CACHED_BLOCKS = 4
ATTEMPTS_IN_GROUP = 8  # to replace a damaged pack's patch; a group may lie in one pack
BALANCED = ("label", "slide", "patient")


class Blend:
    """Which of several sources every draw comes from, and the how manieth of that source it is.

    weights  positive, one a source
    seed     of the pattern

    In every block each source has its share, rounded so that the error never adds up; the sequence
    inside a block is shuffled. A block is 1,024 draws, or as many as give every source one: with
    less, differences of rounded sums could be negative.
    """

    MIN_BLOCK, MAX_BLOCK = 1 << 10, 1 << 20

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        shares = np.cumsum(weights / np.sum(weights))
        # Whole numbers of 2^-32: counts of any block are exact on every machine.
        self.shares = [0, *(round(share * (1 << 32)) for share in shares[:-1].tolist()), 1 << 32]
        least = min(np.diff(self.shares).tolist())
        if least * self.MAX_BLOCK < 1 << 32:
            raise ValueError(
                f"weight {least / (1 << 32):.1e} of all draws; {1 / self.MAX_BLOCK:.1e} at least"
            )
        self.block_size = max(self.MIN_BLOCK, -(-(1 << 32) // least))
        self.seed = seed
        self.blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def draws(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and number in the source of the draws [start, stop), both int64."""
        blocks = range(start // self.block_size, -(-stop // self.block_size))
        parts = [self.block(block) for block in blocks] or [(np.zeros(0, int), np.zeros(0, int))]
        offset = blocks.start * self.block_size
        cut = slice(start - offset, stop - offset)
        return (
            np.concatenate([sources for sources, _ in parts])[cut],
            np.concatenate([numbers for _, numbers in parts])[cut],
        )

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and numbers of a block's draws."""
        if block not in self.blocks:
            before, after = self.counts(block), self.counts(block + 1)
            repeats = after - before
            sources = np.repeat(np.arange(len(repeats)), repeats)
            numbers = np.arange(self.block_size) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            numbers += before[sources]
            # Sources are shuffled; inside a source the numbers stay ascending.
            shown = sources[shuffled(self.block_size, key_of("blend", self.seed, block))]
            back = np.argsort(np.argsort(shown, kind="stable"), kind="stable")
            if len(self.blocks) >= CACHED_BLOCKS:
                self.blocks.pop(next(iter(self.blocks)))
            self.blocks[block] = (shown, numbers[back])
        return self.blocks[block]

    def counts(self, block: int) -> np.ndarray:
        """Draws of every source before a block."""
        total = block * self.block_size
        ends = [total * share >> 32 for share in self.shares]
        return np.diff(np.array(ends, np.int64))


class BalancedSampler:
    """As many draws of every label (or slide, or patient) as of any other.

    Inside a group each patch is drawn once before any is drawn again. Reads single patches from
    anywhere: right for local disks; a remote set is soon in the cache as a whole.

    by     label, slide or patient
    rows   rows of the patch table to draw from, ascending
    seed   of the order

    Patches without a label (slide) are left out. Holds 8 bytes a patch.
    """

    def __init__(self, shards: ShardSet, by: str, rows: np.ndarray, seed: int) -> None:
        groups = groups_of(shards, by, rows)
        known = np.flatnonzero(groups >= 0)
        if not len(known):
            raise InputError(f"{shards.folder}: balance={by!r}, but no chosen patch has a {by}")
        order = np.argsort(groups[known], kind="stable")
        self.members = rows[known][order]
        self.counts = np.unique(groups[known], return_counts=True)[1]
        self.starts = np.cumsum(self.counts) - self.counts
        self.seed = seed
        self.inverse: np.ndarray | None = None  # where a row is among the members
        self.blend = Blend(np.ones(len(self.counts)), seed)

    @property
    def size(self) -> int:
        """Draws an epoch: as many as there are patches to draw from."""
        return len(self.members)

    @property
    def ahead(self) -> int:
        """None: packs are touched at random."""
        return 0

    @property
    def chosen(self) -> np.ndarray:
        """Rows that are in some group."""
        return np.sort(self.members)

    def draw(self, epoch: int, start: int, stop: int) -> Drawn:
        """The draws [start, stop) of an epoch."""
        groups, numbers = self.blend.draws(epoch * self.size + start, epoch * self.size + stop)
        passes, places = np.divmod(numbers, self.counts[groups])
        pairs = np.stack([groups, passes])
        distinct, which = np.unique(pairs, axis=1, return_inverse=True)
        keys = [key_of("group", self.seed, *pair) for pair in distinct.T.tolist()]
        places = permute(places, self.counts[groups], np.array(keys, np.uint64)[which.reshape(-1)])
        rows = self.members[self.starts[groups] + places]
        return Drawn(np.zeros_like(rows), rows, passes)

    def replacement(self, row: int, attempt: int) -> int:
        """Another patch of the same group, or of any when a few of those are damaged too."""
        if self.inverse is None:
            self.inverse = np.argsort(self.members)
        found = np.searchsorted(self.members, row, sorter=self.inverse)
        place = int(self.inverse[found])
        start, count = 0, self.size
        if attempt <= ATTEMPTS_IN_GROUP:
            group = int(np.searchsorted(self.starts, place, side="right")) - 1
            start, count = int(self.starts[group]), int(self.counts[group])
        step = key_of("replacement", attempt) % count
        return int(self.members[start + (place - start + step) % count])


def groups_of(shards: ShardSet, by: str, rows: np.ndarray) -> np.ndarray:
    """Group number of every row, -1 where it has none; InputError for an unknown patient."""
    stored = shards.patches[rows]["slide" if by == "patient" else by].astype(np.int64)
    if by != "patient":
        return np.asarray(stored)
    used = np.unique(stored[stored >= 0]).tolist()
    remedy = "balance='slide' where every slide is a patient"
    named_patients(shards, [shards.manifest.slides[number] for number in used], remedy)
    patients = names_of(shards, by)
    number = {name: index for index, name in enumerate(dict.fromkeys(patients))}
    lookup = np.array([*(number[name] for name in patients), -1])
    grouped: np.ndarray = lookup[stored]
    return grouped


SetSampler = PackSampler | BalancedSampler


class MixtureSampler:
    """Draws from several sets by weight; each set runs through its own epochs at its own pace.

    A set's next epoch starts when its patches are used up, wherever the mixture's epoch stands: a
    small set with a large weight is repeated, and every patch of it is seen equally often.

    size  draws an epoch; None takes the number of patches of all sets
    """

    def __init__(
        self,
        samplers: Sequence[SetSampler],
        weights: Sequence[float],
        seed: int,
        size: int | None = None,
    ) -> None:
        self.samplers = samplers
        self.blend = Blend(np.array(weights, np.float64), seed)
        self.total = size or sum(sampler.size for sampler in samplers)

    @property
    def size(self) -> int:
        """Draws an epoch."""
        return self.total

    @property
    def ahead(self) -> int:
        """The largest window of the sets: of the mixture's draws each set has a part."""
        return max(sampler.ahead for sampler in self.samplers)

    def draw(self, epoch: int, start: int, stop: int) -> Drawn:
        """The draws [start, stop) of an epoch."""
        sets, numbers = self.blend.draws(epoch * self.total + start, epoch * self.total + stop)
        rows, passes = np.zeros_like(numbers), np.zeros_like(numbers)
        for which in np.unique(sets).tolist():
            places = np.flatnonzero(sets == which)  # their numbers are consecutive
            begin, sampler = int(numbers[places[0]]), self.samplers[which]
            drawn = draw_on(sampler, begin, begin + len(places))
            rows[places], passes[places] = drawn.rows, drawn.passes
        return Drawn(sets, rows, passes)


Sampler = SetSampler | MixtureSampler


def draw_on(sampler: SetSampler, start: int, stop: int) -> Drawn:
    """The draws [start, stop) of a sampler's epochs laid end to end."""
    parts = []
    for epoch in range(start // sampler.size, -(-stop // sampler.size)):
        offset = epoch * sampler.size
        first, last = max(start - offset, 0), min(stop - offset, sampler.size)
        parts.append(sampler.draw(epoch, first, last))
    return join(parts)
