"""Which patches' codes were found sound: in memory that a loader's workers share."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.store.open_files import Signature

if TYPE_CHECKING:
    from torch import Tensor

RECHECK_EPOCHS = 10  # a disk may lose what it was read from without telling


class CodeChecks:
    """Marks of patches that had their checksum.

    A patch is checked when it is first read, by whichever process does, again when its shard's
    size, time or inode is another, and every RECHECK_EPOCHS epochs.

    first_patches  row of every shard's first patch, and one past the last
    signatures     of the shards as they were when the set was opened; none for a location, whose
                   packs lie in a cache that others clear: they are checked when they are opened
    """

    def __init__(self, first_patches: np.ndarray, signatures: list[Signature]) -> None:
        self.first_patches, self.signatures = first_patches, signatures
        self.round = 0
        self.shared: Tensor | None = None
        size = -(-int(first_patches[-1]) // 8) if signatures else 0
        # A bit a patch. Forked workers see such memory change, without torch; see `__getstate__`.
        self.marks = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which shares memory by torch's handles: the marks move there."""
        import torch

        from latentds.core.shared_memory import shared_zeros

        if self.shared is None:
            self.shared = shared_zeros(len(self.marks), torch.uint8)
            moved = self.shared.numpy()
            moved[:] = self.marks
            self.marks = moved
        return self.__dict__ | {"marks": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        assert self.shared is not None
        self.marks = self.shared.numpy()

    def look_at(self, shard: int, signature: Signature) -> None:
        """Forget a shard's marks where it has changed."""
        if signature != self.signatures[shard]:
            self.signatures[shard] = signature
            first, end = self.first_patches[shard : shard + 2].tolist()
            self.marks[first // 8 : -(-end // 8)] = 0

    def begin_epoch(self, epoch: int) -> None:
        """Forget all marks every few epochs."""
        if epoch // RECHECK_EPOCHS != self.round:
            self.round = epoch // RECHECK_EPOCHS
            self.marks[:] = 0

    def doubtful(self, rows: np.ndarray) -> np.ndarray:
        """Places of rows that are not marked, int64."""
        return np.flatnonzero(~(self.marks[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1)

    def found_sound(self, rows: np.ndarray) -> None:
        """Mark rows. Two processes may lose each other's marks: those are checked once more."""
        np.bitwise_or.at(self.marks, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
