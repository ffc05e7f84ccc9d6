"""Feeds of `pretrain`: this rank's patches of one optimizer step after the other.

A feed has `facts` for result.json (source, kind, bytes_per_patch, patch_px, ...), the steps of an
epoch as its length, and a state of plain JSON values that is the same on every rank. Iterated, it
gives this rank's share of each step, endless over epochs: groups of patches of one size.
"""
# b patches of this rank's share of a step, C channels (3 of images), H W pixels or latent cells
# N patches, n of a step's share

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from latentds.core.randomness import key_of, patch_seeds, permute
from latentds.embedders.latent_stem import LatentStemConfig
from latentds.errors import ContractError, InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.order import join
from latentds.quantizers.codebooks import StoredCodebook
from latentds.sources.slide_names import some

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.patches import PatchSet
    from latentds.loading.loader import LatentLoader
    from latentds.loading.mixing import MixedLoader

TOTALS = ("waited_s", "aside_s")


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


class LoaderFeed:
    """Data sets of latents, decoded or as they are; a loader's batch is this rank's step."""

    def __init__(self, loader: LatentLoader | MixedLoader, facts: dict[str, Any]) -> None:
        self.loader, self.facts = loader, facts

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        while True:
            for batch in self.loader:
                parts: list[Any] = batch if isinstance(batch, list) else [batch]
                yield [
                    FeedBatch(part.latents if part.images is None else part.images, part.seeds)
                    for part in parts
                ]

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        self.loader.load_state_dict(state, bad_packs)

    def gather_bad_packs(self) -> list[str]:
        return self.loader.gather_bad_packs()


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOrder:
    """A permutation of N patches an epoch; what does not fill a last step is left out of it.

    A pure function of the step; `record` is its identity, without the place.
    """

    patches: int
    global_batch: int
    rank: int
    ranks: int
    seed: int

    @property
    def steps(self) -> int:
        return self.patches // self.global_batch

    def share(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and seeds, int64 (n,), of this rank in a step."""
        epoch, number = divmod(step, self.steps)
        size = self.global_batch // self.ranks
        first = number * self.global_batch + self.rank * size
        places = np.arange(first, first + size)
        rows = permute(places, self.patches, key_of("epoch", self.seed, epoch))
        zeros = np.zeros_like(rows)
        return rows, patch_seeds(self.seed, zeros + epoch, zeros, rows)

    def record(self) -> dict[str, Any]:
        return {"patches": self.patches, "global_batch": self.global_batch, "seed": self.seed}


class SetOrder:
    """The order and the seeds that a data set of latents has in a loader.

    dataset  shuffled, last='drop', of this rank
    rows_of  for every row of its patch table, the row of the originals; -1 for none
    """

    def __init__(self, dataset: LatentDataset, rows_of: np.ndarray) -> None:
        self.dataset, self.rows_of = dataset, rows_of
        self.steps = len(dataset)

    def share(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and seeds, int64 (n,), of this rank in a step."""
        epoch, number = divmod(step, self.steps)
        dataset = self.dataset
        stretches = dataset.batching.stretches(number, dataset.rank)
        drawn = join([dataset.sampler.draw(epoch, *stretch) for stretch in stretches])
        seeds = patch_seeds(dataset.seed, drawn.passes, drawn.sets, drawn.rows)
        return self.rows_of[drawn.rows], seeds

    def record(self) -> dict[str, Any]:
        state = self.dataset.state_at(0, 0).to_json()
        return {name: value for name, value in state.items() if name not in ("epoch", "batch")}


class PatchSetFeed:
    """Originals, as they are or through a codec, in an order of their own or in a set's."""

    def __init__(
        self,
        patches: PatchSet,
        order: OwnOrder | SetOrder,
        device: torch.device,
        facts: dict[str, Any],
    ) -> None:
        self.patches, self.order, self.device, self.facts = patches, order, device, facts
        self.step = 0

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        first = self.step
        stream = self.patches.stream(self.requests(first))
        for number, images in enumerate(stream, first):
            _, seeds = self.order.share(number)
            self.step = number + 1  # before the trainer has it: a state taken then includes it
            values = images.to(self.device).float() / 255
            yield [FeedBatch(values, torch.from_numpy(seeds).to(self.device))]
        raise InputError(f"{self.facts['source']}: ended after {self.step} steps")

    def requests(self, first: int) -> Iterator[np.ndarray]:
        while True:
            yield self.order.share(first)[0]
            first += 1

    def state_dict(self) -> dict[str, Any]:
        return self.order.record() | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        del bad_packs
        for name, value in self.order.record().items():
            if state.get(name) != value:
                raise ContractError(
                    f"{self.facts['source']}: the run was at patches with {name} "
                    f"{state.get(name)!r}, these have {value!r}; give the same --originals and "
                    "--paired-with, or another --out"
                )
        self.step = int(state["step"])

    def gather_bad_packs(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedSource:
    """An open feed and what a run has to know of it.

    data_id      identity of the patches, 16 hex digits
    patches      of an epoch
    stem         of networks that read latents, None for pixels
    codebook     that the latents are rounded to, None for pixels
    decoder_ids  identity of every set's decoder, empty where nothing is decoded
    """

    feed: LoaderFeed | PatchSetFeed
    data_id: str
    patches: int
    stem: LatentStemConfig | None = None
    codebook: StoredCodebook | None = None
    decoder_ids: tuple[str, ...] = ()


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


def rows_of_set(dataset: LatentDataset, patches: PatchSet, where: str) -> np.ndarray:
    """For every row of a set's patch table, int64, the row of its original; -1 outside the split.

    raises  InputError where the originals are not those that the set was converted from
    """
    shards = dataset.shards
    chosen = np.arange(*shards.patch_range(dataset.split))
    sources = shards.read_columns(chosen, ("source",))["source"]
    stored = shards.patches[chosen]
    table = patches.table
    columns = (table.sources, table.x.tolist(), table.y.tolist(), table.size_px.tolist())
    places = {key: row for row, key in enumerate(zip(*columns, strict=True))}
    numbers = (stored[name].tolist() for name in ("x", "y", "size_px"))
    keys = list(zip(sources, *numbers, strict=True))
    missing = sorted(key for key in keys if key not in places)
    if missing:
        names = some([f"{source}@{x},{y} of {size} px" for source, x, y, size in missing])
        raise InputError(
            f"--paired-with {shards.folder}: {len(missing):,} of its {len(keys):,} patches are not "
            f"in {where}: {names}; give what it was converted from, with the same options"
        )
    rows = np.full(len(shards), -1, np.int64)
    rows[chosen] = [places[key] for key in keys]
    return rows


class TimeLedger:
    """A feed whose costs are counted: the engine's loader, so that they outlast a kill.

    Totals are means of the ranks; a run that goes on adds to those of its checkpoint.
    """

    def __init__(self, feed: LoaderFeed | PatchSetFeed, device: torch.device) -> None:
        self.feed, self.device = feed, device
        self.before = dict.fromkeys(TOTALS, 0.0)
        self.waited_s = self.aside_s = 0.0

    def __iter__(self) -> Iterator[list[FeedBatch]]:
        patches = iter(self.feed)
        while True:
            start = time.perf_counter()
            groups = next(patches)
            self.waited_s += time.perf_counter() - start
            yield groups

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Work that is not part of training: probes."""
        start = time.perf_counter()
        yield
        self.aside_s += time.perf_counter() - start

    def totals(self) -> dict[str, float]:
        """Seconds so far, this run's and those before it. Collective."""
        own = torch.tensor([self.waited_s, self.aside_s], dtype=torch.float64, device=self.device)
        dist.all_reduce(own)
        means = zip(TOTALS, (own / dist.get_world_size()).tolist(), strict=True)
        return {name: self.before[name] + seconds for name, seconds in means}

    def state_dict(self) -> dict[str, Any]:
        """Of the feed, and the totals. Collective."""
        return {"feed": self.feed.state_dict(), **self.totals()}

    def load_state_dict(self, state: dict[str, Any], bad_packs: Sequence[str] = ()) -> None:
        """Go on; ContractError where the feed is another."""
        self.feed.load_state_dict(state["feed"], bad_packs)
        self.before = {name: float(state[name]) for name in TOTALS}

    def gather_bad_packs(self) -> list[str]:
        """Damaged packs that any rank has met. Collective."""
        return self.feed.gather_bad_packs()
