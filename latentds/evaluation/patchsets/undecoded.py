"""Patches whose latents go into a network as they are, normalized: nothing is decoded."""
# n patches of a request, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses

import torch

from latentds.autoencoders.autoencoder import short
from latentds.codecs import LatentSpec
from latentds.codecs.naming import latent_text
from latentds.codecs.quantizers import latent_shape
from latentds.core.processes import choose_device
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import ContractError, InputError
from latentds.evaluation.patchsets.coded_patches import FITTED_TO, SEED, LatentsOnTheFly, fit_sample
from latentds.evaluation.patchsets.developing import UndecodedCodes
from latentds.evaluation.patchsets.latent_patches import Shards
from latentds.evaluation.patchsets.open_patch_sets import (
    find_codec,
    find_shards,
    make_codec,
    memory_of,
    refuse,
    stored_facts,
)
from latentds.evaluation.patchsets.patch_set import SourceFacts
from latentds.evaluation.patchsets.patch_set_config import PatchInput
from latentds.evaluation.patchsets.patches import PatchSet
from latentds.evaluation.patchsets.picture_patches import Pictures
from latentds.quantizers.codebooks import ChannelStatistics, rounded
from latentds.store.channel_statistics import channel_statistics

PREFIX = "latents:"  # of the name, before that of the same latents decoded


@dataclasses.dataclass(frozen=True, eq=False)
class UndecodedPatches:
    """A set of patches by their latents.

    patches  its `images` and `stream` give latents float32 (n, C, h, w), normalized, instead of
             pixels; all else is as of the same patches decoded
    stem     what a network needs to know of them
    cells    (h, w)
    """

    patches: PatchSet
    stem: LatentStemConfig
    cells: tuple[int, int]


def open_undecoded(config: PatchInput, stem: LatentStemConfig | None = None) -> UndecodedPatches:
    """The latents of a data set, or of originals through an autoencoder's codec.

    stem    of a network that is there already: latents are normalized as it has them
    raises  InputError for originals without a codec that makes latents, or for a decoder;
            ContractError for other latents than the stem's, and what `open_patches` raises
    """
    refuse(config, ("decoder",), "for latents that go in as they are")
    device, shards = choose_device(config.device), find_shards(config)
    if shards is not None:
        return of_shards(config, shards, device, stem)
    spec = find_codec(config)
    if not isinstance(spec, LatentSpec):
        raise InputError(
            f"{config.location}: originals have no latents (--codec {config.codec}); convert them "
            "and give the data set, or name an autoencoder, as --codec tiny+kmeans"
        )
    return of_originals(config, spec, device, stem)


def of_shards(
    config: PatchInput, shards: Shards, device: torch.device, stem: LatentStemConfig | None
) -> UndecodedPatches:
    facts = stored_facts(config, shards)
    manifest = shards.shards.manifest
    contract = manifest.contract
    if stem is None:
        stem = LatentStemConfig.of(contract, channel_statistics(shards.shards))
    check_latents(stem, contract.latent_id, config.location)
    encoder = str(contract.autoencoder.get("encoder") or contract.autoencoder["name"])
    codec = latent_text(encoder, contract.codebook.text)
    described = SourceFacts(name=f"{PREFIX}{codec}", codec=codec, autoencoder=encoder, **facts)
    books = [stem.statistics.normalized(book) for book in manifest.codebooks]
    latents = UndecodedCodes(books, device, torch.float32)
    patches = PatchSet(shards, latents, described, memory_of(config))
    return UndecodedPatches(patches, stem, contract.latents_shape[1:])


def of_originals(
    config: PatchInput,
    spec: LatentSpec,
    device: torch.device,
    stem: LatentStemConfig | None,
) -> UndecodedPatches:
    """Latents made of pictures, patch by patch, as a data set would store them."""
    pictures, codec, decoded = make_codec(config, spec, None, device)
    making = LatentsOnTheFly(codec, device)
    channels, *cells = latent_shape(codec.card, pictures.patch_px)
    if stem is None:
        statistics = sampled_statistics(config, pictures, making)
        identity = codec.card.latent_id
        stem = LatentStemConfig(
            channels, codec.card.factor, statistics.mean, statistics.divisors, identity
        )
    check_latents(stem, codec.card.latent_id, config.location)
    making.normalize = stem.normalize
    facts = dataclasses.replace(decoded, name=f"{PREFIX}{decoded.codec}", decoder=None)
    patches = PatchSet(pictures, making, facts, memory_of(config))
    return UndecodedPatches(patches, stem, (cells[0], cells[1]))


def sampled_statistics(
    config: PatchInput, pictures: Pictures, making: LatentsOnTheFly
) -> ChannelStatistics:
    """Mean and deviation of every channel over patches drawn as a codebook's are."""
    chosen, _ = fit_sample(dataclasses.replace(config, codebook_from=None), pictures)
    parts = [making.stored(pixels) for pixels in chosen.sample(FITTED_TO, SEED)]
    by_channel = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1).double()
    mean, std = by_channel.mean(1).tolist(), by_channel.std(1, correction=0).tolist()
    count = by_channel.shape[1]
    return ChannelStatistics(tuple(map(rounded, mean)), tuple(map(rounded, std)), count)


def check_latents(stem: LatentStemConfig, latent_id: str, where: str) -> None:
    """ContractError for latents that mean something else than those a network has learned."""
    if stem.latent_id and stem.latent_id != latent_id:
        raise ContractError(
            f"{where}: latents of latent_id {short(latent_id)}, the network reads "
            f"{short(stem.latent_id)}; give latents of the same autoencoder"
        )
