"""LatentLoader: batches decoded to pixels on a device, in the main process."""
# B batch, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from latentds.autoencoders import load_autoencoder
from latentds.autoencoders.base import Autoencoder, check_decoder
from latentds.autoencoders.cards import CARDS
from latentds.batch import Batch
from latentds.dataset import LatentDataset, check_bad
from latentds.errors import WeightsError
from latentds.format import Contract
from latentds.launcher import gather
from latentds.mixture import Mixture
from latentds.quantizer import dequantize
from latentds.transfers import Transfers

logger = logging.getLogger(__name__)


class LatentLoader:
    """Iterates a data set in decoded batches; every iteration is an epoch.

    folder, split, batch_size, global_batch_size, shuffle, seed, last, lanes, where, slides,
    balance, columns, masks, max_bad, rank, world_size: see LatentDataset

    device        where batches end up and are decoded
    num_workers   processes that read codes; 0 reads in this one
    decode        "pixels" (batch.images), "latents" (batch.latents, float32) or "codes"
                  (batch.codes, uint8)
    autoencoder   object, name or path whose decoder is used instead of the recorded one; it must
                  read the same latent_id
    dtype         of decoder and images: float32, or bfloat16 for speed
    decode_chunk  patches decoded at once, to bound the decoder's memory; None decodes the batch
                  whole
    transform     applied to the images (B, 3, H, W) of every batch, on the device
    as_tuple      yield (images, labels) instead of a Batch

    `state_dict` counts batches handed out; the iteration after `load_state_dict` goes on behind
    them: from a state taken at an epoch's end it yields nothing, and the one after is the next.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Mixture,
        split: str = "train",
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        last: str = "pad",
        lanes: int = 1,
        where: str | None = None,
        slides: Sequence[str] | None = None,
        balance: str | None = None,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        decode: str = "pixels",
        autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
        dtype: torch.dtype = torch.float32,
        decode_chunk: int | None = None,
        transform: Callable[[Tensor], Any] | None = None,
        as_tuple: bool = False,
        columns: Sequence[str] = (),
        masks: bool = False,
        max_bad: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        prefetch_factor: int = 2,
        multiprocessing_context: str | None = None,
    ) -> None:
        if decode not in ("pixels", "latents", "codes"):
            raise ValueError(f"decode={decode!r}; one of 'pixels', 'latents', 'codes'")
        if decode_chunk is not None and decode_chunk < 1:
            raise ValueError(f"decode_chunk={decode_chunk}; at least 1")
        self.dataset = LatentDataset(
            folder,
            split,
            batch_size=batch_size,
            global_batch_size=global_batch_size,
            shuffle=shuffle,
            seed=seed,
            last=last,
            lanes=lanes,
            where=where,
            slides=slides,
            balance=balance,
            columns=columns,
            masks=masks,
            max_bad=max_bad,
            rank=rank,
            world_size=world_size,
        )
        if as_tuple and not shuffle and last == "pad" and self.dataset.world_size > 1:
            raise ValueError(
                "as_tuple cannot tell which patches only fill up a rank's last batch; take Batch "
                "and its `valid`, or last='drop' or 'repeat'"
            )
        self.device, self.decode, self.dtype = torch.device(device), decode, dtype
        self.decode_chunk, self.transform, self.as_tuple = decode_chunk, transform, as_tuple
        self.contract = self.dataset.shards.manifest.contract
        self.autoencoder = self.find_autoencoder(autoencoder) if decode == "pixels" else None
        self.transfers: DataLoader[tuple[Batch, list[int]]] = DataLoader(
            Transfers(self.dataset),
            batch_size=None,
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=prefetch_factor if num_workers else None,
            persistent_workers=num_workers > 0,
            multiprocessing_context=multiprocessing_context if num_workers else None,
        )
        self.table = self.contract.codebook.table(self.device)
        self.epoch, self.handed_out = 0, 0
        self.resuming = False
        self.bad_packs: list[str] = []  # damaged ones this rank has met, and replaced

    @property
    def classes(self) -> list[str]:
        """Class names, sorted, as ImageFolder has them."""
        return self.dataset.classes

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Label of every class name, as ImageFolder has it."""
        return self.dataset.class_to_idx

    def __len__(self) -> int:
        """Batches of an epoch on this rank."""
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; without it, every iteration runs the next one."""
        if not (self.resuming and epoch == self.epoch):  # a resumed epoch keeps its place
            self.epoch, self.handed_out, self.resuming = epoch, 0, False

    def __iter__(self) -> Iterator[Any]:
        if self.handed_out and not self.resuming:
            self.epoch, self.handed_out = self.epoch + 1, 0
        self.resuming = False
        self.dataset.set_epoch(self.epoch, self.handed_out)
        for batch in self.received():
            self.note_bad(batch)
            ready = self.prepare(batch)
            self.handed_out += (
                1  # before the trainer has it: a state taken inside its loop includes it
            )
            yield ready

    def received(self) -> Iterator[Batch]:
        """Batches as the workers' transfers bring them."""
        for transfer, sizes in self.transfers:
            start = 0
            for size in sizes:
                yield transfer[start : start + size]
                start += size

    def note_bad(self, batch: Batch) -> None:
        """Collect what workers found damaged; raise where all of them together found too much."""
        new = [text for text in batch.bad if text not in self.bad_packs]
        for text in new:
            logger.warning("replaced a damaged pack: %s", text)
        self.bad_packs += new
        check_bad(self.bad_packs, max(self.dataset.max_bad, 0))

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective: every rank has to call it.

        Call it where you save a state; `state_dict` itself never communicates.
        """
        return sorted(gather({text: text for text in self.bad_packs}))

    def prepare(self, batch: Batch) -> Any:
        """A batch from a worker, moved, decoded, transformed."""
        batch = batch.to(self.device, non_blocking=True)
        if self.decode != "codes":
            latents = dequantize(batch.codes, self.contract.codebook, self.table)
            batch = dataclasses.replace(batch, latents=latents)
        if self.decode == "pixels" and batch.latents is not None:
            images = self.decode_latents(batch.latents)
            images = self.transform(images) if self.transform else images
            batch = dataclasses.replace(batch, images=images, latents=None)
        if not self.as_tuple:
            return batch
        shown = {"pixels": batch.images, "latents": batch.latents, "codes": batch.codes}
        return shown[self.decode], batch.labels

    @torch.no_grad()  # not inference_mode: its tensors could not enter the trainer's graph
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], padding cropped."""
        assert self.autoencoder is not None
        height, width = self.contract.patch_px
        chunks = torch.split(latents, self.decode_chunk or len(latents))
        images = torch.cat([self.autoencoder.decode(chunk) for chunk in chunks])
        return images[:, :, :height, :width]

    def find_autoencoder(self, given: Autoencoder | str | os.PathLike[str] | None) -> Autoencoder:
        """The decoder to use, on the device; ContractError where it reads other latents."""
        autoencoder: Autoencoder
        if given is None:
            autoencoder = recorded_autoencoder(self.contract, self.dataset.shards.folder)
        elif isinstance(given, (str, os.PathLike)):
            autoencoder = load_autoencoder(given)
        else:
            autoencoder = given
        check_decoder(autoencoder.card, self.contract.latent_id, str(self.dataset.shards.folder))
        if autoencoder.card.decoder_id != self.contract.decoder_id:
            logger.info("decoding with %s, not with the decoder the data set was checked with",
                        autoencoder.card.name)  # fmt: skip
        moved: Autoencoder = autoencoder.to(self.device, self.dtype)
        return moved

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands: plain JSON values, the same on every rank."""
        return self.dataset.state_at(self.epoch, self.handed_out).to_json()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches `state` counts.

        ContractError where it is of another data set or order.
        """
        self.dataset.load_state_dict(state)
        self.epoch, self.handed_out, self.resuming = state["epoch"], state["batch"], True


def recorded_autoencoder(contract: Contract, folder: Path) -> Autoencoder:
    """The autoencoder a data set was made with, by its recorded name."""
    name = str(contract.autoencoder.get("name"))
    if name not in CARDS:
        raise WeightsError(
            f"{folder}: made with a local autoencoder {name!r}; pass its folder (autoencoder=... "
            "in Python, --autoencoder on the command line)"
        )
    return load_autoencoder(name)
