"""MixedLoader: sets of other latents or patch sizes in one training, each with its own decoder.

Sets that one LatentLoader can mix (one latent_id, shape and patch size) are a group, with a loader
of its own; every global batch has a fixed share of each group. Views of one size make them agree:
that the pixels of a view then stand for one size in micrometres is checked.
"""
# S sets, G groups

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentds.core.processes import find_rank
from latentds.errors import ContractError
from latentds.loading.batch import Batch
from latentds.loading.dataset import check_bad
from latentds.loading.fields_of_view import check_fields
from latentds.loading.grouping import (
    Decoding,
    check_ranks,
    find_decoders,
    fix_shares,
    group_sets,
    patches_of,
)
from latentds.loading.loader import LatentLoader
from latentds.loading.mixture import Mixture
from latentds.loading.options import Order, Select
from latentds.store.cache import CacheConfig
from latentds.store.format import joined_names
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

STATE_VERSION = 1
GROUP_SEEDS = 1 << 48  # beyond what a mixture adds for its sets


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Sets that one loader mixes.

    numbers  of the sets among all, in their order
    share    patches of a global batch
    """

    numbers: list[int]
    share: int
    loader: LatentLoader


class MixedLoader:
    """Iterates a mixture in lists of decoded batches, one a group of sets; every time an epoch.

    weights        folder or location: weight; or a Mixture
    split          of all sets
    global_batch_size  patches of all groups and ranks together
    shuffle, seed  see LatentDataset; groups do not run through like orders
    decoder        object, name, path, ORG/NAME[@REVISION] or several of them: a group takes the one
                   that reads its latents, else the recorded one; two for one group are refused
    num_workers    processes that read codes, shared out among the groups, one each at least
    max_bad        damaged packs of all groups together to replace before giving up
    allow_mixed_mpp  mix sets whose patches show fields of unlike size, in micrometres
    rank, world_size   of this process; read from torch.distributed or the launcher where not given
    options        of every group's LatentLoader: device, dtype, decoding, views, select, ...
    raises         ContractError for fields of unlike size, or a decoder that reads no set's
                   latents; WeightsError for a set whose decoder is not at hand; InputError for a
                   number of ranks that does not divide the shares; UnknownNameError for a split
                   that is not there

    Every set runs through its own epochs at its own pace, whatever the others do: an epoch here is
    as many batches as all patches together fill. Shares follow from weights and global batch alone,
    so that any number of ranks that divides them goes on from a state. `batch.labels` count in
    `classes`, `batch.sets` in the order of the weights, over all groups.
    """

    def __init__(
        self,
        weights: Mapping[str | os.PathLike[str], float] | Mixture,
        split: str = "train",
        *,
        global_batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        decoder: Decoding | Sequence[Decoding] | None = None,
        num_workers: int = 0,
        max_bad: int = 0,
        allow_mixed_mpp: bool = False,
        cache: CacheConfig | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        refuse_options(options)
        mixture = weights if isinstance(weights, Mixture) else Mixture(weights)
        self.folders, self.max_bad = mixture.folders, max_bad
        self.sets = [ShardSet(folder, cache=cache) for folder in mixture.folders]
        check_fields(self.sets, allow_mixed_mpp, split)
        rank, world_size = find_rank(rank, world_size)
        grouped = group_sets(self.sets)
        totals = [math.fsum(mixture.weights[number] for number in group) for group in grouped]
        self.shares = fix_shares(totals, global_batch_size)
        check_ranks(self.shares, world_size)
        patches = mixture.epoch_patches or sum(patches_of(part, split) for part in self.sets)
        self.batches = max(patches // global_batch_size, 1)
        decoders = find_decoders(self.sets, grouped, decoder)
        settings = options | {"shuffle": shuffle, "max_bad": max_bad, "cache": cache}
        settings["num_workers"] = max(num_workers // len(grouped), 1) if num_workers else 0
        self.groups = []
        for place, (numbers, share) in enumerate(zip(grouped, self.shares, strict=True)):
            settings |= {"seed": seed + place * GROUP_SEEDS, "decoder": decoders[place]}
            parts = {mixture.folders[n]: mixture.weights[n] for n in numbers}
            own = Mixture(parts, epoch_patches=share * self.batches)
            order = Order(global_batch_size=share, last="drop", rank=rank, world_size=world_size)
            loader = LatentLoader(own, split, order=order, **settings)
            self.groups.append(Group(numbers, share, loader))
            named = ", ".join(str(mixture.folders[number]) for number in numbers)
            logger.info("%s: %d of %d patches a batch", named, share, global_batch_size)
        self.classes = joined_names(group.loader.classes for group in self.groups)
        self.lookups: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self.batches

    def __iter__(self) -> Iterator[list[Batch]]:
        iterators = [iter(group.loader) for group in self.groups]
        for batches in zip(*iterators, strict=True):
            yield [self.renumber(*pair) for pair in enumerate(batches)]

    def renumber(self, place: int, batch: Batch) -> Batch:
        """A group's batch with labels and sets numbered as in the whole mixture."""
        labels, sets = self.numbers(place, batch.labels.device)
        own = torch.zeros_like(batch.labels) if batch.sets is None else batch.sets
        return dataclasses.replace(batch, labels=labels[batch.labels], sets=sets[own])

    def numbers(self, place: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What a group's labels and sets are in the whole mixture; copied to a device once."""
        if (place, device) not in self.lookups:
            group = self.groups[place]
            known = {name: number for number, name in enumerate(self.classes)}
            # The last entry is for -1, no label.
            labels = torch.tensor([*(known[name] for name in group.loader.classes), -1])
            sets = torch.tensor(group.numbers)
            self.lookups[place, device] = (labels.to(device), sets.to(device))
        return self.lookups[place, device]

    def set_epoch(self, epoch: int) -> None:
        """Choose the next iteration's epoch; without it, every iteration runs the next one."""
        for group in self.groups:
            group.loader.set_epoch(epoch)

    @property
    def bad_packs(self) -> list[str]:
        """Damaged packs that this rank has met, and replaced."""
        found = itertools.chain.from_iterable(group.loader.bad_packs for group in self.groups)
        return list(dict.fromkeys(found))

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective: every rank has to call it.

        raises  TooManyBadSamplesError, on every rank alike, where they are more than `max_bad`
        """
        parts = [group.loader.gather_bad_packs() for group in self.groups]
        found = sorted(set(itertools.chain.from_iterable(parts)))
        check_bad(found, self.max_bad)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the next batches stand: plain JSON values, the same on every rank."""
        states = [group.loader.state_dict() for group in self.groups]
        return {"version": STATE_VERSION, "shares": list(self.shares), "groups": states}

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on after the batches `state` counts.

        bad_packs  what `gather_bad_packs` gave then: they count towards `max_bad`
        raises     ContractError where it is of other sets, weights, or another order
        """
        where = ", ".join(map(str, self.folders))
        if state.get("version") != STATE_VERSION or not isinstance(state.get("groups"), list):
            raise ContractError(
                f"{where}: the loader state is of no mixture of several latents or patch sizes; "
                "open what it was taken of"
            )
        if state.get("shares") != self.shares or len(state["groups"]) != len(self.groups):
            raise ContractError(
                f"{where}: the loader state has batches of {state.get('shares')} patches, this "
                f"mixture of {self.shares}; the same sets, weights and global batch size are wanted"
            )
        places = {(own.get("epoch"), own.get("batch")) for own in state["groups"]}
        if len(places) > 1:
            raise ContractError(f"{where}: the loader state has its groups at {places}; damaged")
        for group, own in zip(self.groups, state["groups"], strict=True):
            group.loader.load_state_dict(own, bad_packs)


def refuse_options(options: Mapping[str, Any]) -> None:
    """ValueError for options of a LatentLoader that mean nothing over several of them."""
    for name in ("batch_size", "as_tuple", "autoencoder", "order"):
        if options.get(name):
            raise ValueError(f"{name}= is not for a mixed loader; leave it")
    if options.get("select", Select()).balance is not None:
        raise ValueError("balance= is not for a mixed loader; leave it")
    if options.get("decode", "pixels") != "pixels":
        raise ValueError(
            f"decode={options['decode']!r}; latents of several kinds are one input as pixels only"
        )
