"""Which patch stands at which place of an epoch, and which places a rank has in a batch.

Pure functions of (seed, epoch, place) and of the numbers of batch and rank. Draws by weight, or of
every label alike, are `sampling.py`'s.
"""
# B patches of a rank's batch, D draws

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import numpy as np

from latentds.core.randomness import key_of, permute, shuffled
from latentds.errors import ContractError
from latentds.store.format import Spans
from latentds.store.reader import ShardSet

WINDOW_PACKS = 128  # packs whose patches are shuffled among each other
MIN_WINDOW, MAX_WINDOW = 1 << 14, 1 << 18  # patches; packs of one patch, packs of whole slides
CACHED_ORDERS, CACHED_WINDOWS = 2, 4
LAST = ("pad", "drop", "repeat")
STATE_VERSION = 2
DEFAULT_BATCH = 256


class Layout:
    """Packs (or what a selection left of them) that fill the positions 0..size-1 end to end.

    first  position where every pack starts, (P,), ascending, or the packs as Spans
    size   positions
    base   what `first` counts from

    Holds besides only the packs that are not of the usual size: none or one a shard for packs of
    fixed size, every one where slides are packs.
    """

    def __init__(self, first: np.ndarray | Spans, size: int, base: int = 0) -> None:
        if not isinstance(first, Spans):
            first = Spans.listed(np.append(first.astype(np.int64), base + size))
        self.first, self.size, self.base = first, size, base
        self.usual, self.odd = first.unlike()
        self.odd_counts = first.counts(self.odd)
        self.window = min(max(WINDOW_PACKS * self.usual, MIN_WINDOW), MAX_WINDOW)

    def __len__(self) -> int:
        return len(self.first)

    def find(self, position: int) -> tuple[int, int]:
        """The pack that holds a position, and how far into it."""
        pack = int(self.first.find(position + self.base))
        return pack, position - self.span(pack)[0]

    def span(self, pack: int) -> tuple[int, int]:
        """First position of a pack, and how many it has."""
        return int(self.first[pack]) - self.base, int(self.first.counts(pack))


class EpochOrder:
    """Order of the positions of a layout in one epoch.

    Shuffled, packs are permuted and laid end to end, and inside windows of 128 packs (at least
    16,384 places) the patches are permuted: a stretch of an epoch touches few packs, each of them
    in one short time, which is what makes reading cheap; `latentds bench shuffle` tells how far
    from uniform that is.
    """

    def __init__(self, layout: Layout, seed: int, epoch: int, shuffle: bool) -> None:
        self.layout, self.seed, self.epoch, self.shuffle = layout, seed, epoch, shuffle
        self.key = key_of("packs", seed, epoch)
        self.windows: dict[int, np.ndarray] = {}
        if shuffle:
            self.find_odd_slots()

    def __len__(self) -> int:
        return self.layout.size

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions of the layout at the places [start, stop) of the epoch, int64."""
        if not self.shuffle or start >= stop:
            return np.arange(start, stop)
        size = self.layout.window
        windows = range(start // size, -(-stop // size))
        offset = windows.start * size
        if len(windows) == 1:
            return self.window(windows.start)[start - offset : stop - offset]
        positions = np.concatenate([self.window(window) for window in windows])
        return positions[start - offset : stop - offset]

    def window(self, window: int) -> np.ndarray:
        """Positions in a window; the last few are kept, neighbouring batches share them."""
        if window not in self.windows:
            start = window * self.layout.window
            size = min(self.layout.window, len(self) - start)
            if len(self.windows) >= CACHED_WINDOWS:
                self.windows.pop(next(iter(self.windows)))
            key = key_of("window", self.seed, self.epoch, window)
            positions = self.resolve(np.arange(start, start + size))
            self.windows[window] = positions[shuffled(size, key)]
        return self.windows[window]

    def find_odd_slots(self) -> None:
        """Find where the permutation put the packs of unusual size, and at which place they start.

        Between them all packs are alike, so that a place is found by a division.
        """
        slots = permute(self.layout.odd, len(self.layout), self.key, inverse=True)
        order = np.argsort(slots)
        self.odd_slots = slots[order]
        counts = self.layout.odd_counts[order]
        surplus = np.cumsum(counts - self.layout.usual)
        self.odd_starts = self.odd_slots * self.layout.usual + surplus - counts + self.layout.usual
        self.odd_ends = self.odd_starts + counts

    def resolve(self, places: np.ndarray) -> np.ndarray:
        """Positions at consecutive places of the permuted packs laid end to end."""
        usual = self.layout.usual
        slots, offsets = np.divmod(places, usual)
        if len(self.odd_slots):
            before = np.searchsorted(self.odd_starts, places, side="right") - 1
            past = np.flatnonzero(before >= 0)  # behind or inside a pack of unusual size
            odd = before[past]
            beyond = places[past] - self.odd_ends[odd]
            inside = beyond < 0
            skipped, rest = np.divmod(beyond, usual)
            slots[past] = np.where(inside, self.odd_slots[odd], self.odd_slots[odd] + 1 + skipped)
            offsets[past] = np.where(inside, places[past] - self.odd_starts[odd], rest)
        touched = np.arange(slots[0], slots[-1] + 1)
        packs = permute(touched, len(self.layout), self.key)
        starts = self.layout.first[packs] - self.layout.base
        positions: np.ndarray = starts[slots - slots[0]] + offsets
        return positions


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
        """Draws an epoch: the patches."""
        return self.layout.size

    @property
    def ahead(self) -> int:
        """Draws after which other packs are touched, 0 where any may be at any time: a window."""
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


def join(parts: list[Drawn]) -> Drawn:
    """Draws end to end."""
    fields = (np.concatenate([getattr(p, f) for p in parts]) for f in ("sets", "rows", "passes"))
    return Drawn(*fields)


def global_size(batch_size: int | None, global_batch_size: int | None, ranks: int) -> int:
    """Patches of a global batch, from either size."""
    if global_batch_size is None:
        size = DEFAULT_BATCH if batch_size is None else whole("batch_size", batch_size)
        if size < 1:
            raise ValueError(f"batch_size={batch_size}; at least 1")
        return size * ranks
    if batch_size is not None and batch_size * ranks != global_batch_size:
        raise ValueError(
            f"batch_size={batch_size} on {ranks} ranks is not global_batch_size="
            f"{global_batch_size}; give one of them"
        )
    return whole("global_batch_size", global_batch_size)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Position and everything the order depends on; neither ranks nor workers.

    dataset_id  of the stored patches; of a mixture, of its sets' identities
    revision    commit or manifest the location resolved to, None for local folders
    selection   digest of `where` and `slides`, None without
    mixture     digest of weights and epoch length, None for one set
    epoch, batch   the next global batch
    """

    version: int = STATE_VERSION
    dataset_id: str
    latent_id: str
    revision: str | None
    split: str
    shuffle: bool
    seed: int
    global_batch_size: int
    last: str
    lanes: int
    balance: str | None
    selection: str | None
    mixture: str | None
    epoch: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def check_state(state: dict[str, Any], own: LoaderState, folder: object) -> LoaderState:
    """The position of `state`; ContractError where it is of another data set or order."""
    check_is_state(state, folder)
    for name, value in own.to_json().items():
        found = state.get(name)
        if name in ("epoch", "batch"):
            if type(found) is not int or found < 0:
                raise ContractError(f"loader state has {name} {found!r}; damaged")
        elif found != value and not (name == "revision" and None in (found, value)):
            raise ContractError(
                f"{folder}: loader state has {name} {found!r}, this loader {value!r}; open the "
                "same data set (and revision) with the same split, selection, seed, shuffle, last, "
                "lanes and global_batch_size"
            )
    return dataclasses.replace(own, epoch=state["epoch"], batch=state["batch"])


def check_is_state(state: object, folder: object) -> None:
    """ContractError for what no `state_dict` gives, such as the None of a checkpoint without."""
    if not isinstance(state, dict):
        raise ContractError(f"{folder}: loader state {state!r:.80}; pass what state_dict() gave")


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's too, as Python's, which states hold; TypeError for others."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}; a whole number is wanted") from None
