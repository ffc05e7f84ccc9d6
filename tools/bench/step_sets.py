"""The set a bench of training steps reads, its decoder, and its loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentds_tools.bench.decode_shapes import check_known, find_decoder

from latentds.loading.decoding import Decode
from latentds.loading.options import Order

if TYPE_CHECKING:
    import torch
    from latentds_tools.bench.step_config import Config

    from latentds.autoencoders.autoencoder import Autoencoder
    from latentds.loading.batch import Batch
    from latentds.loading.loader import LatentLoader

RECORDED = "the recorded decoder"


@dataclasses.dataclass(frozen=True)
class StepSource:
    """What is read.

    folder       of the set
    autoencoder  whose decoder is used; None for the recorded one, and where nothing is decoded
    decoder      its name
    weights      random or loaded; empty where nothing is decoded
    """

    folder: Path
    autoencoder: Autoencoder | None
    decoder: str
    weights: str


def open_source(config: Config, work: Path) -> StepSource:
    """The set given, or one of random codes for the decoder; InputError where they do not fit."""
    if config.folder is None:
        return write_random(config, work)
    if config.input == "latents":
        return StepSource(config.folder, None, "none", "")
    if config.decoder is None:
        return StepSource(config.folder, None, RECORDED, "loaded")
    autoencoder, weights = named(config.decoder)
    if weights == "random":
        autoencoder = for_set(config.folder, autoencoder)
    return StepSource(config.folder, autoencoder, config.decoder, weights)


def named(name: str) -> tuple[Any, str]:
    """The autoencoder of a decoder's name; UnknownNameError lists the known ones."""
    check_known(name)
    return find_decoder(name)


def for_set(folder: Path, autoencoder: Any) -> Any:
    """A decoder of random weights that claims to read a set's latents, whose shape it must fit."""
    from latentds.errors import InputError
    from latentds.store.manifest import read_manifest

    contract, card = read_manifest(folder).contract, autoencoder.card
    factor = contract.patch_px[0] // contract.latents_shape[1]
    if (card.channels, card.factor) != (contract.latents_shape[0], factor):
        fit = f"f{factor} and {contract.latents_shape[0]} channels"
        raise InputError(
            f"{folder}: latents of {fit}; decoder {card.name!r} reads f{card.factor} and "
            f"{card.channels} channels. Choose one that fits, or leave the set away"
        )
    autoencoder.card = dataclasses.replace(card, latent_id=contract.latent_id)
    return autoencoder


def write_random(config: Config, work: Path) -> StepSource:
    """A set of random codes that the decoder fits, which claims to read them."""
    from latentds_tools.bench.synthetic import random_contract, write_synthetic

    from latentds.autoencoders.autoencoder import latent_cells

    name = config.decoder or "turbo-s"
    autoencoder, weights = named(name)
    card, edge = autoencoder.card, config.patch_size
    shape = (card.channels, *latent_cells((edge, edge), card.factor))
    write_synthetic(work / "set", int(config.patches or 0), shape=shape, patch_px=edge)
    if config.input == "latents":
        return StepSource(work / "set", None, "none", "")
    latent_id = random_contract().latent_id
    autoencoder.card = dataclasses.replace(card, latent_id=latent_id)
    return StepSource(work / "set", autoencoder, name, weights)


def open_loader(
    source: StepSource, config: Config, device: torch.device, dtype: torch.dtype, **options: Any
) -> LatentLoader:
    """The loader, shuffling as a training does.

    options  decode and views
    """
    from latentds.loading.loader import LatentLoader

    return LatentLoader(
        source.folder,
        config.split,
        batch_size=config.batch_size,
        shuffle=True,
        order=Order(last="drop"),
        device=device,
        num_workers=config.num_workers or 0,
        autoencoder=source.autoencoder,
        dtype=dtype,
        decoding=Decode(
            channels_last=config.channels_last,
            compile=config.compile,
            cuda_graph=config.cuda_graph,
        ),
        **options,
    )


def endless(loader: LatentLoader) -> Generator[Batch, None, None]:
    """Batches of one epoch after the other."""
    while True:
        yield from loader


def check_enough(folder: Path, split: str, batch_size: int) -> None:
    """InputError where a split does not fill a batch."""
    from latentds.errors import InputError
    from latentds.store.manifest import read_manifest

    patches = read_manifest(folder).splits.get(split)
    if patches is not None and patches < batch_size:  # an unknown split is the loader's to name
        raise InputError(
            f"{folder}: {patches} patches in split {split!r}, a batch is {batch_size}; "
            "a smaller --batch-size"
        )
