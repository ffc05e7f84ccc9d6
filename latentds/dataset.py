"""LatentDataset: batches of codes as a PyTorch IterableDataset.

CPU only, split over ranks and workers.
"""
# B batch, R ranks, W workers

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from latentds.batch import Batch
from latentds.errors import ContractError, FormatError
from latentds.format import PATCHES_TABLE
from latentds.order import EpochOrder
from latentds.quantizer import dequantize
from latentds.reader import ShardSet

STATE_VERSION = 1


class LatentDataset(IterableDataset[Batch]):
    """Ready batches of one split.

    Give it to a DataLoader with `batch_size=None`, or use LatentLoader.

    folder      a data set's folder
    split       train, val, test, ...
    batch_size  patches a batch and rank
    shuffle     a new order every epoch, a function of (seed, epoch) alone
    decode      "codes" (uint8) or "latents" (float32, dequantized here); pixels are LatentLoader's
                business, because a worker process must not touch the GPU
    columns     names among key, source, source_encoding to carry along
    masks       carry the lossless masks
    drop_last   leave out the last, smaller global batch
    rank, world_size   of this process; read from torch.distributed or the launcher where not given

    A global batch is `world_size * batch_size` consecutive places of the order, of which every rank
    takes its stretch; worker w of W makes the batches w, w + W, ... So neither ranks nor workers
    lose or repeat a patch, and the batches come in the same order for any number of workers. The
    last global batch is divided evenly; with fewer patches left than ranks, some ranks get one
    batch fewer (`drop_last` gives all the same number).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        batch_size: int = 256,
        shuffle: bool = False,
        seed: int = 0,
        decode: str = "codes",
        columns: Sequence[str] = (),
        masks: bool = False,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if decode not in ("codes", "latents"):
            raise ValueError(
                f"decode={decode!r}; a LatentDataset gives 'codes' or 'latents', use LatentLoader "
                "for pixels"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; at least 1")
        self.shards = ShardSet(folder)
        self.split, self.batch_size, self.shuffle, self.seed = split, batch_size, shuffle, seed
        self.decode, self.columns, self.masks = decode, tuple(columns), masks
        self.drop_last = drop_last
        self.rank, self.world_size = find_rank(rank, world_size)
        first, end = self.shards.manifest.pack_range(split)
        self.pack_slice = slice(first, end)
        self.classes = list(self.shards.manifest.classes)
        self.class_to_idx = {name: index for index, name in enumerate(self.classes)}
        # (epoch, first batch): in shared memory, so that workers that stay alive see it change
        self.position = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    @property
    def patches(self) -> int:
        """Patches of the split, over all ranks."""
        return self.shards.manifest.splits[self.split]

    @property
    def epoch(self) -> int:
        """The epoch the next iteration belongs to."""
        return int(self.position[0])

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it, that the next iteration starts with."""
        self.position[0], self.position[1] = epoch, first_batch

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.position.share_memory_()  # a copy has memory of its own, its workers must see it

    @property
    def global_batches(self) -> int:
        """Batches of an epoch on the ranks that have most of them."""
        size = self.batch_size * self.world_size
        return self.patches // size if self.drop_last else -(-self.patches // size)

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        full, rest = divmod(self.patches, self.batch_size * self.world_size)
        return full + (0 if self.drop_last else int(rest > self.rank))

    def __iter__(self) -> Iterator[Batch]:
        refuse_cuda_in_worker()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, first = int(self.position[0]), int(self.position[1])
        order = self.order(epoch)
        for batch in range(first + number, len(self), workers):
            yield self.read(order.rows(*self.places(batch)))

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        packs = self.shards.packs[self.pack_slice]
        return EpochOrder(packs["first_patch"], packs["count"], self.seed, epoch, self.shuffle)

    def places(self, batch: int) -> tuple[int, int]:
        """This rank's stretch [start, stop) of the places of global batch `batch`."""
        start = batch * self.batch_size * self.world_size
        size = min(self.batch_size * self.world_size, self.patches - start)
        share, extra = divmod(size, self.world_size)
        begin = start + self.rank * share + min(self.rank, extra)
        return begin, begin + share + (self.rank < extra)

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of the patches at `rows` of the patch table."""
        manifest, table = self.shards.manifest, self.shards.patches[rows]
        codes = torch.from_numpy(self.shards.read_codes(rows))
        self.check_numbers(table)
        return Batch(
            codes=codes,
            labels=torch.from_numpy(table["label"].astype(np.int64)),
            slides=[
                manifest.slides[slide] if slide >= 0 else None for slide in table["slide"].tolist()
            ],
            coords=torch.from_numpy(np.stack([table["x"], table["y"]], 1).astype(np.int64)),
            mpp=torch.from_numpy(table["mpp"].copy()),
            rows=torch.from_numpy(rows),
            latents=dequantize(codes, manifest.contract.codebook)
            if self.decode == "latents"
            else None,
            masks=torch.from_numpy(self.shards.read_masks(rows)) if self.masks else None,
            columns=self.shards.read_columns(rows, self.columns) if self.columns else {},
        )

    def check_numbers(self, table: np.ndarray) -> None:
        """Refuse labels and slides that the manifest does not list: a GPU would die of them."""
        manifest = self.shards.manifest
        for field, names in (("label", manifest.classes), ("slide", manifest.slides)):
            if table[field].min() < -1 or table[field].max() >= len(names):
                raise FormatError(
                    f"{self.shards.folder / PATCHES_TABLE}: {field} {table[field].max()}, but the "
                    f"manifest lists {len(names)}; damaged, fetch it anew"
                )

    def state_at(self, epoch: int, batch: int) -> dict[str, Any]:
        """What resuming at global batch `batch` of `epoch` needs; plain JSON, well under 1 KB."""
        return {
            "version": STATE_VERSION,
            "dataset_id": self.shards.manifest.dataset_id,
            "latent_id": self.shards.manifest.contract.latent_id,
            "split": self.split,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "global_batch_size": self.batch_size * self.world_size,
            "epoch": epoch,
            "batch": batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration where `state` was taken; ContractError if of another run."""
        own = self.state_at(state.get("epoch", 0), state.get("batch", 0))
        for name, value in own.items():
            if state.get(name) != value:
                raise ContractError(
                    f"loader state has {name} {state.get(name)!r}, this loader {value!r}; open the "
                    "same data set with the same split, seed, shuffle and batch_size * world_size"
                )
        self.set_epoch(state["epoch"], state["batch"])


def find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of ranks.

    As given, from torch.distributed, or from the launcher.
    """
    if (rank is None) != (world_size is None):
        raise ValueError("pass both rank and world_size, or neither")
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank = int(os.environ.get("RANK", "0"))
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}")
    return rank, world_size


def refuse_cuda_in_worker() -> None:
    """Say plainly why a worker that inherited or made a CUDA context will not do."""
    if (
        get_worker_info() is not None
        and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        and not torch.cuda._is_in_bad_fork()
    ):
        raise RuntimeError(
            "a DataLoader worker has a CUDA context; latentds decodes in the main process. Remove "
            "CUDA calls from worker_init_fn and from what the dataset carries"
        )
