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

from latentds.autoencoders import load_for_decoding
from latentds.autoencoders.autoencoder import Autoencoder, short
from latentds.core.processes import find_rank
from latentds.errors import ContractError, InputError
from latentds.loading.batch import Batch, check_bad
from latentds.loading.decoding import find_autoencoder
from latentds.loading.fields_of_view import check_fields
from latentds.loading.loader import LatentLoader
from latentds.loading.options import Mixture, Order, Select
from latentds.loading.order import check_is_state, whole
from latentds.store.cache import CacheConfig
from latentds.store.format import joined_names
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

UNITS = (16, 8, 4, 2, 1)  # what shares are multiples of; the larger, the more numbers of ranks do
TOLERANCE = 0.1  # of itself that a share may differ from its weight for a larger unit's sake
Decoding = Autoencoder | str | os.PathLike[str]

STATE_VERSION = 1
GROUP_SEEDS = 1 << 48  # beyond what a mixture adds for its sets


def group_sets(sets: Sequence[ShardSet]) -> list[list[int]]:
    """Numbers of the sets that one loader can mix, in order of their first."""
    groups: dict[Any, list[int]] = {}
    for number, shards in enumerate(sets):
        contract = shards.manifest.contract
        key = (contract.latent_id, contract.encoding, contract.codes_shape, contract.patch_px)
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def patches_of(shards: ShardSet, split: str) -> int:
    """Patches of a split; UnknownNameError where it is not there."""
    first, end = shards.patch_range(split)
    return end - first


def fix_shares(weights: Sequence[float], global_batch: int) -> list[int]:
    """Patches of a global batch that each group has, in proportion to its weight.

    Multiples of 16, or of 8, 4, 2 or 1 where that would move a share by more than a tenth of it.
    raises  InputError where there are fewer patches than groups
    """
    if global_batch < len(weights):
        raise InputError(
            f"global_batch_size={global_batch} for {len(weights)} kinds of latents or patch sizes; "
            "one patch of each at least"
        )
    total = math.fsum(weights)
    wanted = [weight / total * global_batch for weight in weights]
    for unit in UNITS:
        if global_batch % unit or global_batch // unit < len(weights):
            continue
        shares = [unit * count for count in apportion(wanted, global_batch // unit)]
        worst = max(abs(share / exact - 1) for share, exact in zip(shares, wanted, strict=True))
        if worst <= TOLERANCE:
            return shares
    shares = apportion(wanted, global_batch)
    told = ", ".join(f"{exact:.1f}" for exact in wanted)
    logger.warning(
        "the global batch of %d is too small for the weights: shares are %s, not %s",
        global_batch, ", ".join(map(str, shares)), told,
    )  # fmt: skip
    return shares


def apportion(weights: Sequence[float], count: int) -> list[int]:
    """Whole numbers that add up to `count`, by largest remainders, each 1 at least."""
    total = math.fsum(weights)
    exact = [weight / total * count for weight in weights]
    found = [max(math.floor(value), 1) for value in exact]
    while sum(found) < count:
        place = max(range(len(found)), key=lambda i: (exact[i] - found[i], -i))
        found[place] += 1
    while sum(found) > count:  # where small ones were raised to 1
        place = max(range(len(found)), key=lambda i: (found[i] > 1, found[i] - exact[i], -i))
        found[place] -= 1
    return found


def check_ranks(shares: Sequence[int], ranks: int) -> None:
    """InputError where the ranks do not divide every group's share."""
    common = math.gcd(*shares)
    if common % ranks:
        able = [number for number in range(1, common + 1) if not common % number]
        raise InputError(
            f"a global batch has {', '.join(map(str, shares))} patches of the kinds of sets, which "
            f"{ranks} ranks cannot share; {', '.join(map(str, able))} can. Choose such a number of "
            "ranks, or another global batch size"
        )


def find_decoders(
    sets: Sequence[ShardSet],
    groups: Sequence[Sequence[int]],
    given: Decoding | Sequence[Decoding] | None,
) -> list[Autoencoder]:
    """What decodes each group: one of those given that reads its latents, or the recorded one.

    raises  ContractError for one given that reads no set's latents, or two that read the same;
            WeightsError for a set whose decoder is not at hand
    """
    several: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    known = {shards.manifest.contract.latent_id for shards in sets}
    found: dict[Any, Autoencoder] = {}
    for one in several:
        if one is None:
            continue
        network = load_for_decoding(one) if isinstance(one, (str, os.PathLike)) else one
        latent_id = network.card.latent_id
        if latent_id not in known:
            listed = ", ".join(f"{p.folder} {short(p.manifest.contract.latent_id)}" for p in sets)
            raise ContractError(
                f"the decoder {network.card.name!r} reads latents with latent_id "
                f"{short(latent_id)}, none of the sets has such ({listed})"
            )
        if found.setdefault(latent_id, network) is not network:
            raise ContractError(
                f"the decoders {found[latent_id].card.name!r} and {network.card.name!r} read the "
                f"same latents ({short(latent_id)}); give one of them"
            )
    decoders = []
    for numbers in groups:
        contract = sets[numbers[0]].manifest.contract
        key: Any = contract.latent_id
        if key not in found:  # recorded ones are shared, too
            key = (key, str(contract.autoencoder.get("name")))
            found[key] = found.get(key) or find_autoencoder(sets[numbers[0]])
        decoders.append(found[key])
    return decoders


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
        seed, size = whole("seed", seed), whole("global_batch_size", global_batch_size)
        self.shares = fix_shares(totals, size)
        check_ranks(self.shares, world_size)
        patches = mixture.epoch_patches or sum(patches_of(part, split) for part in self.sets)
        self.batches = max(patches // size, 1)
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
        self.lookups = [self.numbers(group) for group in self.groups]

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self.batches

    def __iter__(self) -> Iterator[list[Batch]]:
        iterators = [iter(group.loader) for group in self.groups]
        for batches in zip(*iterators, strict=True):
            yield [self.renumber(*pair) for pair in enumerate(batches)]

    def renumber(self, place: int, batch: Batch) -> Batch:
        """A group's batch with labels and sets numbered as in the whole mixture."""
        labels, sets = self.lookups[place]
        own = torch.zeros_like(batch.labels) if batch.sets is None else batch.sets
        return dataclasses.replace(batch, labels=labels[batch.labels], sets=sets[own])

    def numbers(self, group: Group) -> tuple[Tensor, Tensor]:
        """What a group's labels and sets are in the whole mixture, where its batches lie."""
        known = {name: number for number, name in enumerate(self.classes)}
        # The last entry is for -1, no label.
        labels = torch.tensor([*(known[name] for name in group.loader.classes), -1])
        device = group.loader.device
        return labels.to(device), torch.tensor(group.numbers).to(device)

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
        check_is_state(state, where)
        groups: Any = state.get("groups")
        is_mixed = state.get("version") == STATE_VERSION and isinstance(groups, list)
        if not is_mixed or (state.get("shares"), len(groups)) != (self.shares, len(self.groups)):
            raise ContractError(
                f"{where}: the loader state has batches of {state.get('shares')} patches, this "
                f"mixture of {self.shares}; the same sets, weights and global batch size are wanted"
            )
        places = {(own.get("epoch"), own.get("batch")) for own in groups}
        if len(places) > 1:
            raise ContractError(f"{where}: the loader state has its groups at {places}; damaged")
        for group, own in zip(self.groups, groups, strict=True):
            group.loader.load_state_dict(own, bad_packs)


def refuse_options(options: Mapping[str, Any]) -> None:
    """ValueError for options of a LatentLoader that mean nothing over several of them."""
    given = {name: options[name] for name in ("as_tuple", "autoencoder") if options.get(name)}
    if (balance := options.get("select", Select()).balance) is not None:
        given["balance"] = balance
    if (decode := options.get("decode", "pixels")) != "pixels":
        given["decode"] = decode
    for name, value in given.items():
        raise ValueError(
            f"{name}={value!r} is not for a mixed loader, which gives batches of pixels; of sets "
            "of one latent_id, encoding, shape and patch size LatentLoader(Mixture(...)) takes it"
        )
