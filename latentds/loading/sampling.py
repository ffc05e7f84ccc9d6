"""Samplers: which patch of which set every draw of an epoch is, as pure functions of the draw."""
# D draws

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from latentds.core.randomness import key_of, permute
from latentds.errors import InputError
from latentds.loading.order import Blend, EpochOrder, Layout
from latentds.loading.selection import named_patients, names_of
from latentds.store.reader import ShardSet

CACHED_ORDERS = 2
ATTEMPTS_IN_GROUP = 8  # to replace a damaged pack's patch; a group may lie in one pack
BALANCED = ("label", "slide", "patient")


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """D draws: the set (index), the row of its patch table, and the pass over it, int64 (D,)."""

    sets: np.ndarray
    rows: np.ndarray
    passes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: np.ndarray) -> Drawn:
        return Drawn(self.sets[places], self.rows[places], self.passes[places])


class Sampler(Protocol):
    """What a loader draws from.

    size   draws an epoch
    ahead  draws after which other packs are touched, 0 where any may be at any time
    """

    @property
    def size(self) -> int: ...

    @property
    def ahead(self) -> int: ...

    def draw(self, epoch: int, start: int, stop: int) -> Drawn:
        """The draws [start, stop) of an epoch."""
        ...


class SetSampler(Sampler, Protocol):
    """A sampler of one set.

    chosen  rows of the patch table that may be drawn, ascending
    """

    @property
    def chosen(self) -> np.ndarray | range: ...

    def replacement(self, row: int, attempt: int) -> int:
        """The row that stands in for a damaged one, the attempt-th choice."""
        ...


class PackSampler:
    """Every patch of a split (or of a selection of it) once an epoch, packs at a time.

    rows  selected rows of the patch table, ascending; None for the whole split
    """

    def __init__(
        self, shards: ShardSet, split: str, rows: np.ndarray | None, seed: int, shuffle: bool
    ) -> None:
        self.seed, self.shuffle, self.rows = seed, shuffle, rows
        self.first_row, end = shards.patch_range(split)
        if rows is None:
            packs = shards.first_patch.part(*shards.manifest.pack_range(split))
            self.layout = Layout(packs, end - self.first_row, base=self.first_row)
        else:
            first = np.flatnonzero(np.diff(shards.packs_of(rows), prepend=-1))
            self.layout = Layout(first, len(rows))
        self.orders: dict[int, EpochOrder] = {}

    @property
    def size(self) -> int:
        """Patches."""
        return self.layout.size

    @property
    def ahead(self) -> int:
        """A window."""
        return self.layout.window

    @property
    def chosen(self) -> np.ndarray | range:
        """The split's rows, or those selected."""
        own = range(self.first_row, self.first_row + self.size)
        return own if self.rows is None else self.rows

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; the last two are kept."""
        if epoch not in self.orders:
            if len(self.orders) >= CACHED_ORDERS:
                self.orders.pop(next(iter(self.orders)))
            self.orders[epoch] = EpochOrder(self.layout, self.seed, epoch, self.shuffle)
        return self.orders[epoch]

    def draw(self, epoch: int, start: int, stop: int) -> Drawn:
        """The draws [start, stop) of an epoch."""
        rows = self.row_at(self.order(epoch).positions(start, stop))
        return Drawn(np.zeros_like(rows), rows, np.full_like(rows, epoch))

    def row_at(self, positions: np.ndarray) -> np.ndarray:
        """Rows of the patch table at positions of the selection."""
        return positions + self.first_row if self.rows is None else self.rows[positions]

    def replacement(self, row: int, attempt: int) -> int:
        """The patch as far into the selection's next pack, or the attempt-th next."""
        position = row - self.first_row
        if self.rows is not None:
            position = int(np.searchsorted(self.rows, row))
        pack, offset = self.layout.find(position)
        start, count = self.layout.span((pack + attempt) % len(self.layout))
        return int(self.row_at(np.array([start + offset % count]))[0])


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


class MixtureSampler:
    """Draws from several sets by weight; each set runs through its own epochs at its own pace.

    A set's next epoch starts when its patches are used up, wherever the mixture's epoch stands: a
    small set with a large weight is repeated, and every patch of it is seen equally often.

    size  draws an epoch; None takes the number of patches of all sets
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
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


def draw_on(sampler: Sampler, start: int, stop: int) -> Drawn:
    """The draws [start, stop) of a sampler's epochs laid end to end."""
    parts = []
    for epoch in range(start // sampler.size, -(-stop // sampler.size)):
        offset = epoch * sampler.size
        first, last = max(start - offset, 0), min(stop - offset, sampler.size)
        parts.append(sampler.draw(epoch, first, last))
    return join(parts)


def join(parts: list[Drawn]) -> Drawn:
    """Draws end to end."""
    fields = (np.concatenate([getattr(p, f) for p in parts]) for f in ("sets", "rows", "passes"))
    return Drawn(*fields)
