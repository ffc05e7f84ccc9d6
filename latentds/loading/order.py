"""Which patch stands at which place of an epoch: a pure function of (seed, epoch, place)."""

from __future__ import annotations

import numpy as np

from latentds.core.randomness import key_of, permute, shuffled

WINDOW_PACKS = 128  # packs whose patches are shuffled among each other
MIN_WINDOW, MAX_WINDOW = 1 << 14, 1 << 18  # patches; packs of one patch, packs of whole slides
CACHED_WINDOWS = 4


class Layout:
    """Packs (or what a selection left of them) that fill the positions 0..size-1 end to end.

    first  position where every pack starts, (P,), ascending; kept as it is, a memory-mapped table's
           column stays one
    size   positions
    base   what `first` counts from

    Holds besides only the packs that are not of the usual size: none or one a shard for packs of
    fixed size, every one where slides are packs.
    """

    def __init__(self, first: np.ndarray, size: int, base: int = 0) -> None:
        self.first, self.size, self.base = first, size, base
        counts = np.diff(first.astype(np.int64), append=base + size)
        self.usual = int(np.bincount(counts).argmax())
        self.odd = np.flatnonzero(counts != self.usual)
        self.odd_counts = counts[self.odd]
        self.window = min(max(WINDOW_PACKS * self.usual, MIN_WINDOW), MAX_WINDOW)

    def __len__(self) -> int:
        return len(self.first)

    def find(self, position: int) -> tuple[int, int]:
        """The pack that holds a position, and how far into it."""
        place = self.first.dtype.type(position + self.base)
        pack = int(np.searchsorted(self.first, place, side="right")) - 1
        return pack, position - self.span(pack)[0]

    def span(self, pack: int) -> tuple[int, int]:
        """First position of a pack, and how many it has."""
        start = int(self.first[pack]) - self.base
        end = self.size if pack + 1 == len(self) else int(self.first[pack + 1]) - self.base
        return start, end - start


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
        starts = self.layout.first[packs].astype(np.int64) - self.layout.base
        positions: np.ndarray = starts[slots - slots[0]] + offsets
        return positions


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
            if len(self.blocks) >= CACHED_WINDOWS:
                self.blocks.pop(next(iter(self.blocks)))
            self.blocks[block] = (shown, numbers[back])
        return self.blocks[block]

    def counts(self, block: int) -> np.ndarray:
        """Draws of every source before a block."""
        total = block * self.block_size
        ends = [total * share >> 32 for share in self.shares]
        return np.diff(np.array(ends, np.int64))
