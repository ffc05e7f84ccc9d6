"""How a mixture of unlike sets is parted: groups, their shares of a batch, their decoders."""
# S sets, G groups

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from latentds.autoencoders import load_for_decoding
from latentds.autoencoders.autoencoder import Autoencoder, short
from latentds.errors import ContractError, InputError
from latentds.loading.decoding import find_autoencoder
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

UNITS = (16, 8, 4, 2, 1)  # what shares are multiples of; the larger, the more numbers of ranks do
TOLERANCE = 0.1  # of itself that a share may differ from its weight for a larger unit's sake
Decoding = Autoencoder | str | os.PathLike[str]


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
    several: list[Any] = [] if given is None else [given]
    if isinstance(given, (list, tuple)):
        several = list(given)
    loaded: list[Autoencoder] = [
        load_for_decoding(one) if isinstance(one, (str, os.PathLike)) else one for one in several
    ]
    by_latents: dict[str, Autoencoder] = {}
    for network in loaded:
        other = by_latents.setdefault(network.card.latent_id, network)
        if other is not network:
            raise ContractError(
                f"the decoders {other.card.name!r} and {network.card.name!r} read the same latents "
                f"({short(network.card.latent_id)}); give one of them"
            )
    known = {shards.manifest.contract.latent_id for shards in sets}
    for network in loaded:
        if network.card.latent_id not in known:
            listed = ", ".join(f"{p.folder} {short(p.manifest.contract.latent_id)}" for p in sets)
            raise ContractError(
                f"the decoder {network.card.name!r} reads latents with latent_id "
                f"{short(network.card.latent_id)}, none of the sets has such ({listed})"
            )
    recorded: dict[tuple[str, str], Autoencoder] = {}
    found = []
    for numbers in groups:
        shards = sets[numbers[0]]
        contract = shards.manifest.contract
        key = (contract.latent_id, str(contract.autoencoder.get("name")))
        if contract.latent_id in by_latents:
            found.append(by_latents[contract.latent_id])
            continue
        if key not in recorded:
            recorded[key] = find_autoencoder(shards)
        found.append(recorded[key])
    return found
