"""Which patch stands at which place of an epoch: a pure function of (seed, epoch, place)."""

from __future__ import annotations

import numpy as np

WINDOW_PATCHES = 16_384  # patches that are shuffled among each other, after their packs were


class EpochOrder:
    """The order of one epoch over packs.

    first   rows of the patch table where the packs start, (P,)
    counts  patches of the packs, (P,)

    Shuffled, packs are permuted and laid end to end, and inside windows of 16,384 places the
    patches are permuted: close to a uniform shuffle, while a window touches only some 64 packs of
    256.
    """

    def __init__(
        self, first: np.ndarray, counts: np.ndarray, seed: int, epoch: int, shuffle: bool
    ) -> None:
        self.seed, self.epoch, self.shuffle = seed, epoch, shuffle
        packs = np.arange(len(counts))
        if shuffle:
            packs = np.random.default_rng([seed, epoch, 0]).permutation(packs)
        self.first = first[packs].astype(np.int64)
        self.starts = np.append(0, np.cumsum(counts[packs].astype(np.int64)))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the patch table at the places [start, stop), int64."""
        if not self.shuffle:
            return self.resolve(np.arange(start, stop))
        windows = range(start // WINDOW_PATCHES, -(-stop // WINDOW_PATCHES))
        places = np.concatenate([self.window(window) for window in windows])
        offset = windows.start * WINDOW_PATCHES
        return self.resolve(places[start - offset : stop - offset])

    def window(self, window: int) -> np.ndarray:
        """The permuted places of a window."""
        start = window * WINDOW_PATCHES
        size = min(WINDOW_PATCHES, len(self) - start)
        rng = np.random.default_rng([self.seed, self.epoch, 1, window])
        return start + rng.permutation(size)

    def resolve(self, places: np.ndarray) -> np.ndarray:
        """Rows of the patch table at places of the packs laid end to end."""
        slot = np.searchsorted(self.starts, places, side="right") - 1
        rows: np.ndarray = self.first[slot] + (places - self.starts[slot])
        return rows
