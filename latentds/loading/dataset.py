"""LatentDataset: batches of codes as a PyTorch IterableDataset.

CPU only, split over ranks and workers.
"""
# B batch

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from latentds.core.processes import (
    Sealed,
    find_rank,
    refuse_cuda_in_worker,
    shared_zeros,
    this_worker,
)
from latentds.core.randomness import digest_of
from latentds.core.storage import digest_json
from latentds.errors import ContractError, DamagedPackError, TooManyBadSamplesError
from latentds.loading.batch import Batch, Collator, answering, check_bad, check_group, folders_of
from latentds.loading.fields_of_view import warn_of_fields
from latentds.loading.options import Mixture, Order, Select
from latentds.loading.order import (
    Batching,
    Drawn,
    LoaderState,
    PackSampler,
    check_state,
    global_size,
    join,
    whole,
)
from latentds.loading.sampling import BALANCED, BalancedSampler, MixtureSampler, Sampler, SetSampler
from latentds.loading.selection import select_rows
from latentds.quantizers.codebooks import ChannelStatistics
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.cache import CacheConfig
from latentds.store.channel_statistics import checked_statistics, pool_sets
from latentds.store.reader import ShardSet

LOOK = 8  # one part in so many of a window passes before the next window is asked for
MIN_REPLACEMENTS = 64  # tries to find a sound pack, besides one for each that is damaged
Transfer = tuple[int, Batch, list[int]]
TRANSFER_BYTES = 1 << 22  # 256 patches of 2 KiB alone: 130k/s from two workers; 2,048: 330k/s


class LatentDataset(IterableDataset[Batch]):
    """Ready batches of one split.

    Give it to a DataLoader with `batch_size=None`, or use LatentLoader.

    folder      a data set's folder or location (hf://datasets/ORG/NAME@REVISION, s3://, https://),
                or a Mixture of several
    split       train, val, test, ...
    batch_size  patches a batch and rank (256)
    shuffle     a new order every epoch, a function of (seed, epoch) alone; `set_epoch` begins one
    decode      "codes" (uint8; of entropy-coded records their integers, int16), "latents"
                (float32), both made here, or "stored" (uint8 as it lies on disk, records too);
                pixels are LatentLoader's business: a worker process must not touch the GPU
    normalize   latents less each channel's mean and over its standard deviation: by `statistics`,
                or by those given, as for a network that was trained with others
    columns     names among key, source, source_encoding to carry along
    masks       carry the lossless masks
    max_bad     damaged packs to replace by others (and list in `batch.bad`) before giving up
    cache       where and how much of remote sets is kept
    select      Select: a condition, slides, equal shares of labels, slides or patients
    order       Order: the global batch, what becomes of the last one, ranks, nodes

    A global batch is `global_batch_size` consecutive places of the order, of which every rank takes
    its stretch; worker w of W makes the batches w, w + W, ... So neither ranks nor workers lose or
    repeat a patch, and global batches are the same for any number of either.
    """

    @answering
    def __init__(
        self,
        folder: str | os.PathLike[str] | Mixture,
        split: str = "train",
        *,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        decode: str = "codes",
        normalize: bool | ChannelStatistics = False,
        columns: Sequence[str] = (),
        masks: bool = False,
        max_bad: int = 0,
        cache: CacheConfig | None = None,
        select: Select = Select(),
        order: Order = Order(),
    ) -> None:
        check_asked(decode, bool(normalize), shuffle, select, order)
        self.mixture = folder if isinstance(folder, Mixture) else None
        self.sets = [ShardSet(part, cache=cache) for part in folders_of(folder)]
        self.split, self.shuffle, self.max_bad = split, shuffle, max_bad
        self.seed = whole("seed", seed)
        self.where, self.balance = select.where, select.balance
        self.rank, self.world_size = find_rank(order.rank, order.world_size)
        self.samplers = [self.set_sampler(index, select) for index in range(len(self.sets))]
        chosen = [self.where, select.slides]
        if select.rows is not None:
            chosen.append(np.sort(np.asarray(select.rows)).tolist())
        self.selection = None if chosen == [None, None] else digest_of(chosen)
        self.sampler: Sampler = self.samplers[0]
        if self.mixture is not None:
            warn_of_fields(self.sets, split)
            weights, draws = self.mixture.weights, self.mixture.epoch_patches
            self.sampler = MixtureSampler(self.samplers, weights, self.seed, draws)
        if self.selection is None and self.balance is None and order.lanes == 1:  # all packs, here
            for shards in self.sets:
                shards.pack_table.want_all(split, len(self.sets), bool(columns), masks)
        self.batching = Batching(
            size=self.sampler.size,
            global_batch=global_size(batch_size, order.global_batch_size, self.world_size),
            ranks=self.world_size,
            last=order.last,
            lanes=whole("lanes", order.lanes),
        )
        self.collator = Collator(self.sets, self.seed, decode, columns, masks, select.class_to_idx)
        given = normalize if isinstance(normalize, ChannelStatistics) else None
        self.statistics_given = given and checked_statistics(given, self.shards)
        if normalize:
            self.collator.decoders = self.normalized_codebooks()
        self.bad: dict[tuple[int, int], str] = {}  # (set, pack): what is wrong with it
        # (epoch, first batch): in shared memory, so that workers that stay alive see it change
        self.position = shared_zeros(2, torch.int64)
        self.cursor: tuple[int, int] | None = None  # epoch, batch this worker comes to next
        self.resumed: tuple[int, int] | None = None  # epoch, batch of a state that was loaded

    def set_sampler(self, index: int, select: Select) -> SetSampler:
        """The sampler of one set; a mixture's sets must not run through like orders."""
        shards, seed = self.sets[index], self.seed + (index << 32)
        given, rows = (self.where, select.slides, select.rows), None
        if any(part is not None for part in given):
            rows = select_rows(shards, self.split, *given, self.sets)
        if self.balance is None:
            return PackSampler(shards, self.split, rows, seed, self.shuffle)
        rows = np.arange(*shards.patch_range(self.split)) if rows is None else rows
        return BalancedSampler(shards, self.balance, rows, seed)

    @property
    def shards(self) -> ShardSet:
        """The set, or the first of a mixture."""
        return self.sets[0]

    @functools.cached_property
    def statistics(self) -> ChannelStatistics:
        """Mean and standard deviation of every channel; of a mixture, of what is drawn from it."""
        weights = [1.0] if self.mixture is None else self.mixture.weights
        return self.statistics_given or pool_sets(self.sets, weights)

    def normalized_codebooks(self) -> list[AnyCodebook]:
        """The distinct codebooks of the sets, what they give normalized by `statistics`."""
        return [self.statistics.normalized(book) for book in self.collator.vocabulary.codebooks]

    @property
    def classes(self) -> list[str]:
        """Class names, sorted, as ImageFolder has them; of all sets of a mixture."""
        return self.collator.vocabulary.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of every class name, as ImageFolder has it."""
        return dict(self.collator.vocabulary.number)

    @property
    def patches(self) -> int:
        """Draws of an epoch, over all ranks: the chosen patches, each once, unless balanced."""
        return self.sampler.size

    @property
    def epoch(self) -> int:
        """The epoch the next iteration belongs to."""
        return int(self.position[0])

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the next iteration's epoch and first batch; a loaded state keeps its place."""
        self.cursor = None
        if self.resumed and self.resumed[0] != epoch:
            self.resumed = None
        self.position[0], self.position[1] = epoch, first_batch
        for shards in self.sets:
            shards.begin_epoch(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # A copy has memory of its own, its workers must see it.
        self.position.share_memory_()  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"LatentDataset({self.describe()}, decode={self.collator.decode!r})"

    def describe(self) -> str:
        """What an epoch is made of, for `repr`."""
        folders = " + ".join(str(shards.folder) for shards in self.sets)
        order = f"shuffled by seed {self.seed}" if self.shuffle else "in order"
        ranks = f", rank {self.rank} of {self.world_size}" if self.world_size > 1 else ""
        size = self.batching.global_batch // self.batching.ranks
        return (
            f"{folders}, {self.split}: {self.patches:,} patches {order}, {len(self):,} batches of "
            f"{size}{ranks}"
        )

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return len(self.batching)

    def __iter__(self) -> Iterator[Batch]:
        """This worker's batches from where a loaded state or the epoch begins."""
        refuse_cuda_in_worker()
        self.cursor, self.resumed = self.start(), None
        return self.from_place(*self.cursor)

    def start(self) -> tuple[int, int]:
        """Epoch and batch with which this worker's next iteration starts."""
        epoch, batch = self.resumed or self.position.tolist()
        return epoch, batch + this_worker()[0]

    def from_place(self, epoch: int, first: int) -> Iterator[Batch]:
        """This worker's batches of an epoch from its `first` on."""
        workers = this_worker()[1]
        for batch in range(first, len(self), workers):
            ready = self.batch(epoch, batch)
            self.cursor = (epoch, batch + workers)  # what a state taken now has to start with
            yield ready.packed_now() if get_worker_info() else ready

    def batch(self, epoch: int, number: int, count: int = 1) -> Batch:
        """This rank's part of global batch `number` of an epoch, or of `count` of them in a row."""
        numbers = range(number, number + count)
        stretches = [s for n in numbers for s in self.batching.stretches(n, self.rank)]
        drawn = join([self.sampler.draw(epoch, *stretch) for stretch in stretches])
        valid = np.concatenate([self.batching.valid(n, self.rank) for n in numbers])
        found: list[str] = []
        while True:
            sound = self.replace_bad(drawn)
            try:
                batch = self.collator.collate(sound, valid, tuple(found))
                self.prefetch(epoch, stretches)  # now: what is needed at once went first
                return batch
            except DamagedPackError as error:
                found.append(str(error))
                self.note_bad(error)

    def sizes(self, number: int, count: int) -> list[int]:
        """Patches of this rank's part of `count` batches in a row."""
        return [len(self.batching.valid(n, self.rank)) for n in range(number, number + count)]

    def read(self, rows: np.ndarray) -> Batch:
        """The batch of any patches, by rows of the (first) set's patch table."""
        zeros = np.zeros(len(rows), np.int64)
        return self.collator.collate(Drawn(zeros, rows, zeros), np.ones(len(rows), bool))

    def prefetch(self, epoch: int, stretches: list[tuple[int, int]]) -> None:
        """Start to fetch what remote sets will need one window of the order later.

        Not so during an epoch's first batches: who looks at a few fetches what those have.
        """
        ahead = self.sampler.ahead
        if not ahead or all(shards.revision is None for shards in self.sets):
            return
        for start, stop in stretches:
            if start < ahead // LOOK:
                continue
            later = (min(start + ahead, self.patches), min(stop + ahead, self.patches))
            drawn = self.sampler.draw(epoch, *later)
            for which in np.unique(drawn.sets).tolist():
                self.sets[which].prefetch(drawn.rows[drawn.sets == which])

    def note_bad(self, error: DamagedPackError) -> None:
        """Remember a damaged pack; raise where there are too many."""
        if not self.max_bad:
            raise error
        which = next(i for i, shards in enumerate(self.sets) if shards is error.shards)
        self.bad[which, error.pack] = str(error)
        check_bad(self.bad.values(), self.max_bad)

    def replace_bad(self, drawn: Drawn) -> Drawn:
        """The draws with patches of damaged packs replaced, by a rule that knows only the order.

        Every rank and worker, and a run resumed elsewhere, replaces alike.
        """
        if not self.bad:
            return drawn
        rows = drawn.rows.copy()
        for place, (which, row) in enumerate(zip(drawn.sets.tolist(), rows.tolist(), strict=True)):
            attempt, chosen = 0, row
            while (which, int(self.sets[which].packs_of(chosen))) in self.bad:
                attempt += 1
                if attempt > MIN_REPLACEMENTS + len(self.bad):
                    raise TooManyBadSamplesError(
                        f"{self.sets[which].folder}: no sound pack to replace damaged ones with: "
                        f"{next(iter(self.bad.values()))}"
                    )
                chosen = self.samplers[which].replacement(row, attempt)
            rows[place] = chosen
        return Drawn(drawn.sets, rows, drawn.passes)

    def state_at(self, epoch: int, batch: int) -> LoaderState:
        """What resuming at global batch `batch` of `epoch` needs; plain JSON, well under 1 KB."""
        manifests = [shards.manifest for shards in self.sets]
        ids = [manifest.dataset_id for manifest in manifests]
        revisions = [shards.revision for shards in self.sets]
        mixture, single = self.mixture, len(ids) == 1
        drawn = mixture and [mixture.weights, mixture.epoch_patches]
        return LoaderState(
            dataset_id=ids[0] if single else digest_json(ids),
            latent_id=manifests[0].contract.latent_id,
            revision=revisions[0] if single else digest_of(revisions) if all(revisions) else None,
            split=self.split,
            shuffle=self.shuffle,
            seed=self.seed,
            global_batch_size=self.batching.global_batch,
            last=self.batching.last,
            lanes=self.batching.lanes,
            balance=self.balance,
            selection=self.selection,
            mixture=None if drawn is None else digest_of(drawn),
            epoch=epoch,
            batch=batch,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where this iterator stands, for torchdata's StatefulDataLoader, which asks each worker.

        LatentLoader has a state of its own, free of workers.
        """
        place = self.state_at(*(self.cursor or self.start()))
        return place.to_json() | {"worker": list(this_worker())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration where `state` was taken; ContractError if of another run."""
        loaded = check_state(state, self.state_at(0, 0), self.shards.folder)
        is_over, own = loaded.batch >= len(self), this_worker()
        self.cursor = self.resumed = None
        if "worker" not in state:
            self.set_epoch(*(loaded.epoch + 1, 0) if is_over else (loaded.epoch, loaded.batch))
        elif state["worker"] != list(own):
            raise ContractError(
                f"{self.shards.folder}: loader state of worker {state['worker']}, this is "
                f"{list(own)}; take as many workers, or a LatentLoader's state"
            )
        elif not (is_over and own[1] == 1):  # of several, others may not be done
            self.resumed = loaded.epoch, loaded.batch - own[0]


def check_asked(decode: str, normalize: bool, shuffle: bool, select: Select, order: Order) -> None:
    """Refuse options that are none, or contradict each other."""
    check_group(select, Select, "select")
    check_group(order, Order, "order")
    if decode not in ("codes", "latents", "stored"):
        raise ValueError(
            f"decode={decode!r}; a LatentDataset gives 'codes', 'latents' or 'stored', use "
            "LatentLoader for pixels"
        )
    if normalize and decode != "latents":
        raise ValueError("normalize= is for decode='latents'; pixels and codes stay as they are")
    balance = select.balance
    if balance is not None and (balance not in BALANCED or not shuffle):
        raise ValueError(f"balance={balance!r}; one of {', '.join(BALANCED)}, with shuffle=True")


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
