"""Transfers: several small batches in one shared buffer from a worker to the main process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from latentds.core.shared_memory import Sealed
from latentds.loading.batch import Batch
from latentds.loading.dataset import LatentDataset, refuse_cuda_in_worker, this_worker

Transfer = tuple[int, Batch, list[int]]
TRANSFER_BYTES = 1 << 22  # 256 patches of 2 KiB alone: 130k/s from two workers; 2,048: 330k/s


class Transfers(IterableDataset[Transfer]):
    """A data set's batches, some in a row at a time: the first one's number, all, their sizes.

    Worker w of W makes the transfers w, w + W, ..., so that a DataLoader hands them out in order.
    """

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset
        batching = dataset.batching
        contract = dataset.shards.manifest.contract
        patch_bytes = contract.bytes_per_patch
        if dataset.collator.decode == "latents":
            patch_bytes = 4 * math.prod(contract.latents_shape)
        if dataset.collator.masks:
            patch_bytes += contract.patch_px[0] * contract.patch_px[1]
        batch_bytes = batching.global_batch // batching.ranks * patch_bytes
        self.count = max(1, TRANSFER_BYTES // batch_bytes)

    def __iter__(self) -> Iterator[Any]:
        """Transfers; from a worker they are sealed, which the main process does not see."""
        seal: Callable[[Transfer], Any] = Sealed if get_worker_info() else tuple
        refuse_cuda_in_worker()
        dataset, (number, workers) = self.dataset, this_worker()
        epoch, first = dataset.position.tolist()
        end = len(dataset)
        for start in range(first + number * self.count, end, workers * self.count):
            count = min(self.count, end - start)
            yield seal((start, dataset.batch(epoch, start, count), dataset.sizes(start, count)))
