"""Open what a run of `pretrain` trains on: data sets of latents, or originals."""

from __future__ import annotations

import dataclasses

import torch
from latentds_trainers.pretrain.feeds import FeedSource
from latentds_trainers.pretrain.picture_feed import OwnOrder, PatchSetFeed, SetOrder, rows_of_set
from latentds_trainers.pretrain.schedules import SizedConfig
from latentds_trainers.pretrain.training_sets import open_sets, order_settings

from latentds.core.randomness import digest_of
from latentds.evaluation.patchsets.open_patch_sets import open_patches
from latentds.evaluation.patchsets.patch_set_config import PatchInput
from latentds.loading.dataset import LatentDataset
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
    """Originals, as they are or through a codec."""
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
    facts = {"source": found["name"], **{name: found[name] for name in ("kind", "codec")}}
    facts |= {"bytes_per_patch": found["bytes_per_patch"], "patch_px": found["patch_px"]}
    feed = PatchSetFeed(patches, order, device, facts | {"patches": count})
    parts = [patches.fingerprint(), found["name"], paired_id]
    codebook_id = found["codebook"].get("codebook_id")
    data_id = digest_of([*parts, codebook_id] if codebook_id else parts)
    return FeedSource(feed=feed, data_id=data_id, patches=count)
