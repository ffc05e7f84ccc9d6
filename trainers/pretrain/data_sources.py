"""Open what a run of `pretrain` trains on: data sets of latents, or originals."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from latentds_trainers.pretrain.feeds import (
    FeedSource,
    LoaderFeed,
    OwnOrder,
    PatchSetFeed,
    SetOrder,
    rows_of_set,
)
from latentds_trainers.pretrain.schedules import SizedConfig

from latentds.autoencoders.autoencoder import AutoencoderCard
from latentds.codecs.naming import latent_text
from latentds.core.randomness import digest_of
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import ContractError, InputError, ShapeError, unknown_name
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.hub.licences import recorded_licences
from latentds.loading.dataset import LatentDataset
from latentds.loading.decoding import Decode
from latentds.loading.fields_of_view import check_fields
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Order, check_mixable
from latentds.quantizers.codebooks import StoredCodebook
from latentds.sources.cut_options import CutOptions
from latentds.store.reader import ShardSet


def open_source(config: SizedConfig, device: torch.device, rank: int, ranks: int) -> FeedSource:
    """The feed of the config, which `settle_batch` has made.

    raises  InputError for a set that ends before a step is filled, ContractError for sets that do
            not mix, and what opening a set raises
    """
    if config.originals is not None:
        return open_originals(config, device, rank, ranks)
    return open_sets(config, device, rank, ranks)


def open_originals(config: SizedConfig, device: torch.device, rank: int, ranks: int) -> FeedSource:
    assert config.originals is not None
    cut = {f.name: getattr(config, f.name) for f in dataclasses.fields(CutOptions)}
    patches = open_patches(
        PatchInput(
            **cut,
            data=config.originals,
            codec=config.codec,
            codebook=config.codebook,
            split=None if config.paired_with else config.split,
            keep_mb=config.keep_mb,
            device=str(device),
            workers=max(config.num_workers, 1),
        )
    )
    if config.paired_with is None:
        check_filled(str(config.originals), len(patches), config.global_batch_size)
        order: OwnOrder | SetOrder = OwnOrder(
            patches=len(patches), global_batch=config.global_batch_size,
            rank=rank, ranks=ranks, seed=config.seed,
        )  # fmt: skip
        count, paired_id = len(patches), None
    else:
        shards = ShardSet(config.paired_with)
        paired_id = shards.manifest.dataset_id
        settings = order_settings(config, [shards], rank, ranks)
        dataset = LatentDataset(config.paired_with, config.split, **settings)
        where = str(config.originals)
        order, count = SetOrder(dataset, rows_of_set(dataset, patches, where)), dataset.patches
    found = patches.facts().to_json()
    told = {name: found[name] for name in ("kind", "codec", "bytes_per_patch", "patch_px")}
    facts = {"source": found["name"], **told, "patches": count}
    feed = PatchSetFeed(patches, order, device, facts)
    parts = [patches.fingerprint(), found["name"], paired_id]
    codebook_id = found["codebook"].get("codebook_id")
    data_id = digest_of([*parts, codebook_id] if codebook_id else parts)
    return FeedSource(feed=feed, data_id=data_id, patches=count)


def open_sets(config: SizedConfig, device: torch.device, rank: int, ranks: int) -> FeedSource:
    """Data sets of latents: in one loader where one decoder reads them all."""
    sets = [ShardSet(location) for location in config.data]
    weights = weights_of(config, sets)
    settings = order_settings(config, sets, rank, ranks)
    settings |= {"device": device, "num_workers": config.num_workers, "max_bad": config.max_bad}
    is_latents = config.input == "latents"
    if is_latents:
        settings |= {"decode": "latents", "normalize": True}
    else:
        settings["dtype"] = getattr(torch, config.decode_dtype)
    # static: a step is done with its patches before it asks for more
    chunk = None if is_latents else config.batch_size
    settings["decoding"] = Decode(chunk=chunk, static=True, cuda_graph=config.cuda_graph)
    loader: Any
    try:
        check_mixable(sets)
    except ContractError as reason:
        if is_latents:
            words = f"{reason}; without --input latents, as pixels, others mix too"
            raise ContractError(words) from reason
        from latentds.loading.mixing import MixedLoader

        parts: dict[str | os.PathLike[str], float] = {}
        parts |= zip(config.data, weights, strict=True)
        settings |= {"decoder": config.decoder, "allow_mixed_mpp": config.allow_mixed_mpp}
        settings |= {"global_batch_size": config.global_batch_size}
        settings |= {"rank": rank, "world_size": ranks}
        del settings["order"]
        loader = MixedLoader(parts, config.split, **settings)
        weights = drawn_weights(loader, weights)
    else:
        check_fields(sets, config.allow_mixed_mpp, config.split)
        loader = open_alike(config, weights, settings)
    decoders = decoders_of(loader, sets)
    feed = LoaderFeed(loader, facts_of(config, sets, weights, decoders))
    manifests = [shards.manifest for shards in sets]
    return FeedSource(
        feed=feed,
        data_id=digest_of([manifest.dataset_id for manifest in manifests]),
        patches=sum(manifest.splits[config.split] for manifest in manifests),
        stem=stem_of(loader) if is_latents else None,
        codebook=codebook_of(sets, weights) if is_latents else None,
        decoder_ids=tuple("" if card is None else card.decoder_id for card in decoders),
    )


def open_alike(
    config: SizedConfig, weights: Sequence[float], settings: dict[str, Any]
) -> LatentLoader:
    """One loader of sets that one decoder reads."""
    if len(config.decoder) > 1:
        raise InputError(
            f"--decoder {' '.join(config.decoder)}: the sets have latents of one kind; give one"
        )
    decoder = config.decoder[0] if config.decoder else None
    if len(config.data) == 1:
        return LatentLoader(config.data[0], config.split, decoder=decoder, **settings)
    mixture = Mixture(dict(zip(config.data, weights, strict=True)))
    return LatentLoader(mixture, config.split, decoder=decoder, **settings)


def drawn_weights(loader: Any, weights: Sequence[float]) -> list[float]:
    """Share of every set among the patches of a mixed loader, whose groups have fixed shares."""
    found = list(weights)
    for group, share in zip(loader.groups, loader.shares, strict=True):
        total = sum(weights[number] for number in group.numbers)
        for number in group.numbers:
            found[number] = weights[number] / total * share / sum(loader.shares)
    return found


def order_settings(
    config: SizedConfig, sets: Sequence[ShardSet], rank: int, ranks: int
) -> dict[str, Any]:
    """What the order of latents follows from, as arguments of a loader.

    raises  UnknownNameError for a split that is not there, InputError where all the patches
            together do not fill a step
    """
    counts = []
    for shards in sets:
        if config.split not in shards.manifest.splits:
            splits = shards.manifest.splits
            raise unknown_name(f"split of {shards.folder}", config.split, splits)
        counts.append(shards.manifest.splits[config.split])
    size = config.global_batch_size
    check_filled(", ".join(shards.folder for shards in sets), sum(counts), size)
    return {
        "shuffle": True,
        "seed": config.seed,
        "order": Order(global_batch_size=size, last="drop", rank=rank, world_size=ranks),
    }


def check_filled(names: str, patches: int, global_batch: int) -> None:
    """InputError where all the patches together do not fill a step."""
    if patches < global_batch:
        raise InputError(
            f"{names}: {patches:,} patches end before one step of {global_batch:,} is filled; a "
            "smaller --global-batch-size"
        )


def weights_of(config: SizedConfig, sets: Sequence[ShardSet]) -> list[float]:
    """Share of every set: as given, or by its number of patches."""
    if config.weights:
        return list(config.weights)
    counts = [shards.manifest.splits.get(config.split, 0) for shards in sets]
    return [count / max(sum(counts), 1) for count in counts]


def stem_of(loader: LatentLoader) -> LatentStemConfig:
    """What a network must know of a loader's latents; ShapeError where patches are padded."""
    contract = loader.contract
    stem = LatentStemConfig.of(contract, loader.statistics)
    if contract.latents_shape[1] * stem.factor != contract.patch_px[0]:
        raise ShapeError(
            f"{loader.dataset.shards.folder}: patches of {contract.patch_px[0]} px are padded to "
            f"{contract.latents_shape[1]} latent cells; --input latents needs whole cells"
        )
    return stem


def codebook_of(sets: Sequence[ShardSet], weights: Sequence[float]) -> StoredCodebook:
    """The codebook of most of the patches: what pictures are rounded to like a set's latents."""
    shards, _ = max(zip(sets, weights, strict=True), key=lambda pair: pair[1])
    manifest = shards.manifest
    made = {"origin": "the data set trained on", "dataset_id": manifest.dataset_id}
    contract = manifest.contract
    return StoredCodebook(codebook=contract.codebook, latent_id=contract.latent_id, made=made)


def decoders_of(loader: Any, sets: Sequence[ShardSet]) -> list[AutoencoderCard | None]:
    """The card of what decodes each set; None where latents are the input."""
    if not hasattr(loader, "groups"):
        return [card_of(loader)] * len(sets)
    cards = {number: card_of(group.loader) for group in loader.groups for number in group.numbers}
    return [cards[number] for number in range(len(sets))]


def card_of(loader: LatentLoader) -> AutoencoderCard | None:
    return None if loader.autoencoder is None else loader.autoencoder.card


def facts_of(
    config: SizedConfig,
    sets: Sequence[ShardSet],
    weights: Sequence[float],
    decoders: Sequence[AutoencoderCard | None],
) -> dict[str, Any]:
    total = sum(weights)
    contracts = [shards.manifest.contract for shards in sets]
    stored = sum(w * c.bytes_per_patch for w, c in zip(weights, contracts, strict=True)) / total
    named = [name_of(*pair) for pair in zip(sets, decoders, strict=True)]
    names = ", ".join(dict.fromkeys(named))
    listed = [
        {
            "name": Path(str(shards.folder)).name,
            "dataset_id": shards.manifest.dataset_id,
            "latent_id": shards.manifest.contract.latent_id,
            "weight": weight / total,
            "patches": shards.manifest.splits[config.split],
            **networks_and_licences(shards, decoder),
        }
        for shards, weight, decoder in zip(sets, weights, decoders, strict=True)
    ]
    return {
        "source": names + ("" if config.input == "images" else ", not decoded"),
        "kind": "latents",
        "codec": names,
        "bytes_per_patch": stored,
        "patch_px": list(contracts[0].patch_px),
        "patches": sum(shards.manifest.splits[config.split] for shards in sets),
        "sets": listed,
    }


def networks_and_licences(shards: ShardSet, decoder: AutoencoderCard | None) -> dict[str, Any]:
    """What a set was made with and is decoded with, and every licence that is recorded of it."""
    card = shards.manifest.contract.autoencoder
    found: dict[str, Any] = {
        "licences": [
            {"licence": text} for text in sorted(set(recorded_licences(shards.manifest.made)))
        ],
        "autoencoder": {name: card.get(name) for name in ("name", "licence")},
    }
    if decoder is not None:
        found["decoder"] = {
            name: getattr(decoder, name) for name in ("name", "decoder_id", "licence")
        }
    return found


def name_of(shards: ShardSet, decoder: AutoencoderCard | None) -> str:
    """What a table calls a set's pixels: autoencoder+quantizer, another decoder after a slash."""
    contract = shards.manifest.contract
    book = contract.codebook
    quantizer = book.text
    recorded = str(contract.autoencoder.get("name"))
    text = latent_text(recorded, quantizer)
    if decoder is None or (decoder.name == recorded and not decoder.encoder):
        return text
    return f"{text}/{decoder.name}"
