"""LatentLoader: batches decoded to pixels on a device, in the main process."""
# B batch, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.processes import REMEDY, choose_device, describe_shm, gather, of_worker
from latentds.errors import WorkerError
from latentds.loading.array import Resident
from latentds.loading.augmenting import Making, find_augment, find_transform, replayed
from latentds.loading.batch import Batch, answering, check_bad, check_group
from latentds.loading.dataset import LatentDataset, Transfer, Transfers
from latentds.loading.decoding import Decode, Decoder, Integers, check_decode, make_decoder
from latentds.loading.options import Mixture, Order, Select, Workers
from latentds.loading.order import whole
from latentds.loading.stage import CudaLanes, DecodeStage
from latentds.quantizers.codebooks import ChannelStatistics
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.cache import CacheConfig
from latentds.store.channel_statistics import checked_statistics
from latentds.views.multicrop import MultiCrop

logger = logging.getLogger(__name__)


class LatentLoader:
    """Iterates a data set in decoded batches; every iteration is an epoch.

    folder, split, batch_size, shuffle, seed, columns, masks, max_bad, cache, select, order: see
    LatentDataset

    device        where batches end up
    num_workers   processes that read codes; 0 reads in this one. Workers says more
    decode        "pixels" (batch.images), "latents" (batch.latents, float32), "codes" (batch.codes:
                  uint8, or of entropy-coded records int16 (B, C, h, w) integers, in batch.steps)
                  or "stored" (batch.codes as it lies on disk, records too)
    normalize     latents less each channel's mean and over its standard deviation, by `statistics`;
                  or by the ChannelStatistics given, as for a network trained with others
    autoencoder   object, name or path whose decoder is used instead of the recorded one; it must
                  read the same latent_id
    decoder       the same, meant for a decoder alone: its folder, its training run's folder, or
                  ORG/NAME[@REVISION] on the Hub
    dtype         of decoder and images: float32, or bfloat16 for speed
    decoding      Decode: how the decoder runs, chunks, compilation, graphs; its `dtype` is `dtype`
    transform     applied to the images (B, 3, H, W) of every batch, on the device; one that draws
                  random numbers once a batch, as torchvision's do, is warned of
    views         MultiCrop, or any function of what is decoded and `batch.seeds` that gives Views:
                  batch.views, made on the device of the images before `transform` changes those
    augment       True for flips, turns, crops and changes of colour and stain of every patch's own,
                  drawn from its seed, before `transform`; or a MultiCrop of one global crop
    resident      hold the stored bytes of all that may be drawn where they are decoded: read and
                  checked once, gathered there by the same order; batches and states are those of
                  reading. InputError where they do not fit
    as_tuple      yield (images, labels) instead of a Batch, or (views.crops(), labels)

    `state_dict` counts batches handed out; the iteration after `load_state_dict` goes on behind
    them. A state taken with an epoch's last batch is the beginning of the next epoch.
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
        device: torch.device | str = "auto",
        num_workers: int | Workers = 0,
        decode: str = "pixels",
        normalize: bool | ChannelStatistics = False,
        autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
        decoder: Autoencoder | str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        transform: Callable[[Tensor], Any] | None = None,
        views: Making | None = None,
        augment: bool | MultiCrop = False,
        resident: bool = False,
        as_tuple: bool = False,
        columns: Sequence[str] = (),
        masks: bool = False,
        max_bad: int = 0,
        cache: CacheConfig | None = None,
        select: Select = Select(),
        order: Order = Order(),
        decoding: Decode = Decode(),
    ) -> None:
        check_asked(decode, bool(normalize), views, decoding, (autoencoder, decoder))
        self.dataset = LatentDataset(  # records cross as they are: a sixteenth of their integers
            folder, split, batch_size=batch_size, shuffle=shuffle, seed=seed, decode="stored",
            columns=columns, masks=masks, max_bad=max_bad, cache=cache, select=select, order=order,
        )  # fmt: skip
        check_filled_up(self.dataset, as_tuple)
        if isinstance(normalize, ChannelStatistics):
            self.dataset.statistics_given = checked_statistics(normalize, self.dataset.shards)
        self.decode, self.device = decode, choose_device(device)
        is_kept = views is None or not as_tuple
        self.transform = transform and find_transform(transform, decode, is_kept)
        self.views, self.as_tuple, self.has_told = views, as_tuple, False
        self.contract = self.dataset.shards.manifest.contract
        beside = {"views": views is not None, "masks": masks}
        self.augment: Making | None = None
        if augment is not False:
            self.augment = find_augment(augment, self.contract.patch_px, decode, beside)
        if decoding.cuda_graph and self.device.type == "cuda":
            self.views, self.augment = replayed(self.views), replayed(self.augment)
        books = self.dataset.normalized_codebooks() if normalize else self.codebooks
        given, options = decoder if autoencoder is None else autoencoder, decoding.with_dtype(dtype)
        made = make_decoder(self.dataset.shards, decode, given, self.device, options, books)
        self.decoder = made if isinstance(made, Decoder) else None
        self.integers = made if isinstance(made, Integers) else None
        self.resident = Resident(self.dataset, self.device) if resident else None
        self.stage: DecodeStage | None = None
        if self.device.type == "cuda":
            self.stage = self.make_stage(decoding.static, CudaLanes(self.device))
        self.transfers = self.make_transfers(num_workers)
        self.epoch, self.handed_out, self.resuming = 0, 0, False
        # Damaged ones this rank has met, and replaced.
        self.bad_packs: list[str] = list(self.dataset.bad.values())

    def make_transfers(self, asked: int | Workers) -> DataLoader[Transfer]:
        """What brings codes from the processes that read them."""
        workers = Workers(count=asked) if isinstance(asked, int) else asked
        check_group(workers, Workers, "num_workers")
        return DataLoader(
            Transfers(self.dataset),
            batch_size=None,
            num_workers=workers.count,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=workers.prefetch_factor if workers.count else None,
            persistent_workers=workers.count > 0,
            multiprocessing_context=workers.multiprocessing_context if workers.count else None,
        )

    def __getstate__(self) -> dict[str, Any]:
        transfers = copy.copy(self.transfers)
        transfers._iterator = None  # workers of this process, a copy starts its own
        return self.__dict__ | {"transfers": transfers}

    def make_stage(self, static: bool, lanes: CudaLanes) -> DecodeStage:
        """The ring that decodes ahead on a GPU."""
        batching, contract = self.dataset.batching, self.contract
        pixels = self.decode == "pixels"
        dtype = self.decoder.options.dtype if self.decoder and pixels else torch.float32
        return DecodeStage(
            self.decode_codes,
            (3, *contract.patch_px) if pixels else contract.latents_shape,
            torch.int16 if self.integers else dtype,
            batching.global_batch // batching.ranks,
            self.device,
            lanes,
            static=static,
        )

    @property
    def decode_codes(self) -> Callable[..., Tensor] | None:
        """What is made of a batch's codes, or of the places of resident ones; None for nothing."""
        decode = self.decoder or self.integers
        if decode is None or self.resident is None:
            return decode
        return self.resident.before(decode)

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Whose decoder is used; None where nothing is decoded to pixels."""
        return self.decoder.autoencoder if self.decoder else None

    @property
    def statistics(self) -> ChannelStatistics:
        """Mean and standard deviation of every latent channel, as the manifest records them.

        Of a mixture, those of what is drawn from it, by its weights; those given, where they were.
        """
        return self.dataset.statistics

    @property
    def codebooks(self) -> list[AnyCodebook]:
        """Distinct codebooks of the sets; `batch.codebooks` counts them."""
        return self.dataset.collator.vocabulary.codebooks

    @property
    def classes(self) -> list[str]:
        """Class names, sorted, as ImageFolder has them."""
        return self.dataset.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of every class name, as ImageFolder has it."""
        return self.dataset.class_to_idx

    def __repr__(self) -> str:
        return (
            f"LatentLoader({self.dataset.describe()}, decode={self.decode!r} on {self.device}, "
            f"{self.transfers.num_workers} workers)"
        )

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self.dataset)

    @property
    def sampler(self) -> LatentLoader:
        """Itself: Lightning and timm's train.py tell the epoch to `loader.sampler.set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; without it, every iteration runs the next one.

        The epoch of a loaded state keeps its place; one that the state has just ended is empty.
        """
        epoch = whole("epoch", epoch)
        if self.resuming and epoch == self.epoch:
            return
        if self.resuming and not self.handed_out and epoch == self.epoch - 1:
            logger.warning("epoch %d is over in the loader's state: no batch of it is left", epoch)
            self.epoch, self.handed_out = epoch, len(self)
            return
        self.epoch, self.handed_out, self.resuming = epoch, 0, False

    def __iter__(self) -> Iterator[Any]:
        if self.handed_out and not self.resuming:
            self.epoch, self.handed_out = self.epoch + 1, 0
        self.resuming = False
        self.dataset.set_epoch(self.epoch, self.handed_out)
        with contextlib.closing(self.decoded()) as batches:
            for batch in batches:
                self.note_bad(batch)
                ready = self.finish(batch)
                # Before the trainer has it: a state taken inside its loop includes it.
                self.handed_out += 1
                yield ready

    def decoded(self) -> Generator[Batch, None, None]:
        """Batches decoded: ahead of the trainer on a GPU, when asked for on a CPU."""
        if self.stage is not None:
            yield from self.stage.run(self.received())
        else:
            yield from map(self.prepare, self.received())

    def received(self) -> Iterator[Batch]:
        """Batches as the workers' transfers bring them."""
        for transfer, sizes in self.counted():
            self.tell_unlabelled(transfer)
            start = 0
            for size in sizes:
                yield transfer[start : start + size]
                start += size

    def tell_unlabelled(self, transfer: Batch) -> None:
        """Warn, once, that tuples of (images, labels) have patches without a label."""
        asks = self.as_tuple and self.views is None and not self.has_told
        if asks and bool((transfer.labels < 0).any()):
            self.has_told = True
            logger.warning(
                "%s: as_tuple=True gives labels, and patches of split %r have none, -1; "
                "Select(where='label is not None') leaves them out",
                self.dataset.shards.folder, self.dataset.split,
            )  # fmt: skip

    def counted(self) -> Iterator[tuple[Batch, list[int]]]:
        """The transfers of an epoch, each at its place; WorkerError where one is missing."""
        place, end = self.dataset.position.tolist()[1], len(self)
        for start, transfer, sizes in self.transferred():
            if start != place:
                break
            yield transfer, sizes
            place += len(sizes)
        if place != end:
            raise WorkerError(
                f"{self.dataset.shards.folder}: batch {place} of {end} did not come from its "
                f"worker ({describe_shm()}); {REMEDY}"
            )

    def transferred(self) -> Iterator[Transfer]:
        """What the workers send, an error of theirs without torch's frames.

        One of those frames holds the error itself: a ring that only the collector ends. It ends the
        workers' queues first, and torch then waits 5 s for each worker, which hears nothing.
        """
        try:
            yield from self.transfers
        except Exception as error:
            if not self.transfers.num_workers:
                raise
            raise of_worker(error.with_traceback(None)) from None

    def note_bad(self, batch: Batch) -> None:
        """Collect what workers found damaged; raise where all of them together found too much."""
        new = [text for text in batch.bad if text not in self.bad_packs]
        for text in new:
            logger.warning("replaced a damaged pack: %s", text)
        self.bad_packs += new
        check_bad(self.bad_packs, max(self.dataset.max_bad, 0))

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective: every rank has to call it.

        Call it where you save a state, and hand it to `load_state_dict` with that state;
        `state_dict` itself never communicates. TooManyBadSamplesError, on every rank alike, where
        they are more than `max_bad` together.
        """
        found = sorted(gather({text: text for text in self.bad_packs}))
        check_bad(found, self.dataset.max_bad)
        return found

    def prepare(self, batch: Batch) -> Batch:
        """A batch moved and decoded, at once: what the stage does ahead where there is one."""
        batch = batch.to(self.device)
        images, decode = None, self.decode_codes
        if decode is not None:
            images = decode(batch.codes, batch.codebooks)
        return dataclasses.replace(batch, images=images)

    def finish(self, batch: Batch) -> Any:
        """What the trainer gets of a decoded batch, on its device."""
        if self.resident is not None:
            batch = dataclasses.replace(batch, codes=self.resident(batch.codes))
        if self.decode == "latents":
            batch = dataclasses.replace(batch, latents=batch.images, images=None)
        if self.integers is not None:
            steps = self.integers.steps(batch.codes, batch.codebooks)
            batch = dataclasses.replace(batch, codes=batch.images, images=None, steps=steps)
        if self.views is not None:
            decoded: Any = batch.images if self.decode == "pixels" else batch.latents
            batch = dataclasses.replace(batch, views=self.views(decoded, batch.seeds))
        if self.augment is not None:
            changed = self.augment(batch.images, batch.seeds).globals[0]
            batch = dataclasses.replace(batch, images=changed)
        if self.transform and batch.images is not None:
            batch = dataclasses.replace(batch, images=self.transform(batch.images))
        if not self.as_tuple:
            return batch
        if batch.views is not None:
            return batch.views.crops(), batch.labels
        shown = {"pixels": batch.images, "latents": batch.latents}
        return shown.get(self.decode, batch.codes), batch.labels

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands: plain JSON values, the same on every rank."""
        return self.dataset.state_at(*self.place_of(self.epoch, self.handed_out)).to_json()

    def place_of(self, epoch: int, batch: int) -> tuple[int, int]:
        """An epoch and a batch of it that there is: behind the last comes the next one's first."""
        return (epoch + 1, 0) if batch >= len(self) else (epoch, batch)

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on after the batches `state` counts.

        bad_packs  what `gather_bad_packs` gave then: they count towards `max_bad`
        raises     ContractError where it is of another data set or order
        """
        self.dataset.load_state_dict(state)
        self.bad_packs = list(dict.fromkeys([*self.bad_packs, *bad_packs]))
        self.epoch, self.handed_out = self.place_of(state["epoch"], state["batch"])
        self.resuming = True


def check_asked(
    decode: str, normalize: bool, views: Any, decoding: Decode, decoders: tuple[Any, Any]
) -> None:
    """Refuse options that contradict each other, and views of what is not decoded."""
    check_decode(decode)
    check_group(decoding, Decode, "decoding")
    if normalize and decode != "latents":
        raise ValueError(f"normalize= is for decode='latents', not decode={decode!r}")
    if None not in decoders:
        raise ValueError("autoencoder= and decoder= both name what decodes; pass one of them")
    if views is not None and getattr(views, "reads", decode) != decode:
        raise ValueError(
            f"views of {views.reads} need decode={views.reads!r}, not decode={decode!r}"
        )
    if views is not None and decode not in ("pixels", "latents"):
        raise ValueError(f"views are made of pixels or latents, not of decode={decode!r}")


def check_filled_up(dataset: LatentDataset, as_tuple: bool) -> None:
    """Refuse tuples, which have no `valid`, where that alone tells what fills up a batch."""
    last = dataset.batching.last
    if as_tuple and not dataset.shuffle and last == "pad" and dataset.world_size > 1:
        raise ValueError(
            "as_tuple cannot tell which patches only fill up a rank's last batch; take Batch "
            "and its `valid`, or Order(last='drop') or 'repeat'"
        )
