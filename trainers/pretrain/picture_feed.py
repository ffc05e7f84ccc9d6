"""Originals, as they are or through a codec, as a feed: in an order of their own or in a set's."""
# N patches, n of a step's share

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from latentds_trainers.pretrain.feeds import FeedBatch

from latentds.core.randomness import key_of, patch_seeds, permute
from latentds.errors import ContractError, InputError
from latentds.loading.dataset import LatentDataset
from latentds.loading.sampling import join
from latentds.sources.slide_names import some

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.patches import PatchSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnOrder:
    """A permutation of N patches an epoch; what does not fill a last step is left out of it.

    A pure function of the step; `record` is its identity, without the place.

    raises  InputError for fewer patches than a step takes
    """

    patches: int
    global_batch: int
    rank: int
    ranks: int
    seed: int

    def __post_init__(self) -> None:
        if self.patches < self.global_batch:
            raise InputError(
                f"{self.patches} patches end before one step of {self.global_batch} is filled; a "
                "smaller --global-batch-size"
            )

    @property
    def steps(self) -> int:
        """Of an epoch."""
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
    """A Feed of a PatchSet; its patches have the same rows whatever they went through.

    facts  see Feed
    """

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
        """Rows of every step from `first` on."""
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
