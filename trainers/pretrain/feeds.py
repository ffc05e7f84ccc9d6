"""Feeds of `pretrain`: this rank's patches of one optimizer step after the other."""
# b patches of this rank's share of a step, C channels (3 of images), H W pixels or latent cells

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import InputError
from latentds.quantizers.codebooks import StoredCodebook

if TYPE_CHECKING:
    from latentds.loading.loader import LatentLoader
    from latentds.loading.mixing import MixedLoader


@dataclasses.dataclass(frozen=True, eq=False)
class FeedBatch:
    """Patches of one size.

    values  float (b, C, H, W) on the device: images in [0, 1], or normalized latents
    seeds   int64 (b,), of the patches' random numbers
    """

    values: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> FeedBatch:
        return FeedBatch(self.values[part], self.seeds[part])


class Feed(Protocol):
    """What a run trains on.

    facts  for result.json: source (name), kind, bytes_per_patch, patch_px, ...
    """

    facts: dict[str, Any]

    def __len__(self) -> int:
        """Optimizer steps of an epoch."""
        ...

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        """This rank's share of one optimizer step after the other, endless over epochs.

        Groups of patches of one size each, one group where all are alike.
        raises  InputError where the set ends early
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the next step's patches stand: plain JSON values, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on there; ContractError where the state is of other patches or another order."""
        ...

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedSource:
    """An open feed and what a run has to know of it.

    data_id      identity of the patches, 16 hex digits
    patches      of an epoch
    stem         of networks that read latents, None for pixels
    codebook     that the latents are rounded to, None for pixels
    decoder_ids  identity of every set's decoder, empty where nothing is decoded
    """

    feed: Feed
    data_id: str
    patches: int
    stem: LatentStemConfig | None = None
    codebook: StoredCodebook | None = None
    decoder_ids: tuple[str, ...] = ()


class LoaderFeed:
    """A Feed of data sets of latents, decoded or as they are.

    loader  whose global batch is all ranks' images of an optimizer step
    share   patches of them that are this rank's
    facts   see Feed
    """

    def __init__(
        self, loader: LatentLoader | MixedLoader, share: int, facts: dict[str, Any]
    ) -> None:
        self.loader, self.share, self.facts = loader, share, facts
        self.has_resumed = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        while True:
            count = 0
            for batch in self.loader:
                count += 1
                yield self.groups(batch)
            if count < len(self) and not self.has_resumed:
                raise InputError(
                    f"{self.facts['source']}: ended after {count} of {len(self)} steps of an "
                    "epoch; run 'latentds verify' on it"
                )
            self.has_resumed = False  # the epoch that a run went on in may be nearly over

    def groups(self, batch: Any) -> list[FeedBatch]:
        """A step's patches; InputError where they are fewer than a step takes."""
        parts = [
            FeedBatch(part.latents if part.images is None else part.images, part.seeds)
            for part in (batch if isinstance(batch, list) else [batch])
        ]
        count = sum(map(len, parts))
        if count != self.share:
            raise InputError(
                f"{self.facts['source']}: {count} patches for a step that takes {self.share} on "
                "this rank; the set ended early, run 'latentds verify' on it"
            )
        return parts

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        self.loader.load_state_dict(state, bad_packs)
        self.has_resumed = True

    def gather_bad_packs(self) -> list[str]:
        return self.loader.gather_bad_packs()


def micro_batch(groups: Sequence[FeedBatch], number: int, passes: int) -> list[FeedBatch]:
    """The patches of forward pass `number` of so many: as much of every group where that goes."""
    if all(len(group) % passes == 0 for group in groups):
        sizes = [len(group) // passes for group in groups]
        return [
            group[number * size : (number + 1) * size]
            for group, size in zip(groups, sizes, strict=True)
        ]
    size = sum(map(len, groups)) // passes
    found, start = [], number * size
    for group in groups:
        first, last = max(start, 0), min(start + size, len(group))
        if first < last:
            found.append(group[first:last])
        start -= len(group)
    return found
