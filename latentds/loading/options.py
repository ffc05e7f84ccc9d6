"""What few need to say to a loader, in groups: a mixture of sets, which patches, order, by whom."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from latentds.errors import ContractError
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)
BY_SEED = "every random number follows from seed="
PINNED = "leave it, memory is pinned where a GPU decodes"
OWN_SAMPLER = (
    "select=Select(...) chooses and balances patches; for a sampler of your own open "
    "LatentArray(..., resident=False), a map-style data set for torch's DataLoader"
)
# Words of torch.utils.data.DataLoader, and what does that here.
ANSWERS = {
    "drop_last": "pass order=Order(last='drop')",
    "pin_memory": PINNED,
    "pin_memory_device": PINNED,
    "sampler": OWN_SAMPLER,
    "batch_sampler": OWN_SAMPLER,
    "collate_fn": "batches are made here, on the device; change them by transform=, or by "
    "latentds.loading.adapters.MappedLoader(loader, function)",
    "prefetch_factor": "pass num_workers=Workers(prefetch_factor=...) to a LatentLoader",
    "multiprocessing_context": "pass num_workers=Workers(multiprocessing_context=...) to a "
    "LatentLoader",
    "generator": BY_SEED,
    "worker_init_fn": f"{BY_SEED}, and workers only read",
    "persistent_workers": "workers stay between epochs as they are",
    "timeout": "a worker that dies is told of by WorkerError as it is",
    "in_order": "batches always come in order",
    "dataset": "the first argument is a set's folder or location",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select:
    """Which patches of a split, and how often each is drawn.

    where    condition on label, slide, patient, x, y, mpp, size_px, as in
             "label == 'TUM' and mpp < 0.6"
    slides   names of the slides to use, in any order
    balance  "label", "slide" or "patient": draw every one equally often, with shuffle=True
    class_to_idx   the number of every class name, for a head that was trained with others than the
                   set's own; all names of the set must be there
    rows     patches by their rows in the patch table, int (N,): a list, an array, or an Arrow
             column, `table["row"]` of what is left of `ShardSet.table()`
    """

    where: str | None = None
    slides: Sequence[str] | None = None
    balance: str | None = None
    class_to_idx: Mapping[str, int] | None = None
    rows: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.slides is None:
            return
        listed = list(self.slides)
        if isinstance(self.slides, str) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"slides={self.slides!r}; a list of names is wanted")
        # States hold the digest of this, which is to be one for equal choices.
        object.__setattr__(self, "slides", sorted({str(name) for name in listed}))

    def unbalanced(self, reader: str) -> tuple[str | None, Sequence[str] | None, Any]:
        """`where`, `slides` and `rows`; ValueError for a balance where nothing is drawn."""
        if self.balance is not None:
            raise ValueError(f"balance={self.balance!r}: a {reader} draws nothing; leave it")
        return self.where, self.slides, self.rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """How an epoch's patches are dealt to batches and ranks; all of it is part of a state.

    global_batch_size  patches a batch of all ranks, instead of `batch_size`; the order depends on
                       it, so give this where the number of ranks may change
    last         what becomes of the last, smaller global batch; every rank has as many batches as
                 any other. "pad": dealt out evenly; where ranks do not divide it, some repeat one
                 patch and mark it in `batch.valid`. "drop": left out. "repeat": filled up with the
                 epoch's first patches.
    lanes        number of nodes, where each should read a stretch of its own
    rank, world_size   of this process; read from torch.distributed or the launcher where not given
    """

    global_batch_size: int | None = None
    last: str = "pad"
    lanes: int = 1
    rank: int | None = None
    world_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workers:
    """Processes that read codes, in DataLoader's words.

    count     0 reads in this process
    prefetch_factor, multiprocessing_context   see torch.utils.data.DataLoader
    """

    count: int
    prefetch_factor: int = 2
    multiprocessing_context: str | None = None


class Mixture:
    """Data sets and their weights; give it to LatentLoader or LatentDataset instead of a folder.

    weights        folder or location: weight; positive, they need not add up to 1
    epoch_patches  draws an epoch; None takes the number of patches of all sets

    Every set runs through its own epochs at its own pace: it is not shortened or padded, a small
    set of large weight comes round more often. Codebooks may differ, the latent_id may not; fields
    of unlike size in micrometres are warned of.
    """

    def __init__(
        self,
        weights: Mapping[str | os.PathLike[str], float],
        epoch_patches: int | None = None,
    ) -> None:
        if not isinstance(weights, Mapping):
            raise TypeError(f"{weights!r}: pass Mixture({{folder: weight, ...}})")
        if not weights or not all(0 < weight < math.inf for weight in weights.values()):
            raise ValueError(f"weights={dict(weights)}; at least one set, and every weight above 0")
        if epoch_patches is not None and epoch_patches < 1:
            raise ValueError(f"epoch_patches={epoch_patches}; at least 1")
        self.folders: list[str | os.PathLike[str]] = list(weights)
        self.weights = [float(weight) for weight in weights.values()]
        self.epoch_patches = epoch_patches


def warn_of_alike(sets: Sequence[ShardSet], alike: Sequence[str]) -> None:
    """Tell of two label names that differ in case, spaces, - or _ alone."""
    logger.warning(
        "%s: classes %r and %r are two, and differ in case, spaces, - or _ alone; where they "
        "are one, convert anew with one name",
        ", ".join(str(shards.folder) for shards in sets), *alike,
    )  # fmt: skip


def check_mixable(sets: Sequence[ShardSet]) -> None:
    """Refuse sets whose codes one decoder cannot read into one batch."""
    first = sets[0].manifest.contract
    for shards in sets[1:]:
        contract = shards.manifest.contract
        for name in ("latent_id", "encoding", "codes_shape", "latents_shape", "patch_px"):
            if getattr(contract, name) != getattr(first, name):
                raise ContractError(
                    f"{shards.folder}: {name} {getattr(contract, name)}, but {sets[0].folder} has "
                    f"{getattr(first, name)}; only sets of one latent_id, encoding, shape and "
                    "patch size merge, or mix in one batch. 'latentds repack --encoding' codes one "
                    "set of the same latents as another; latentds.loading.mixing.MixedLoader mixes "
                    "them as pixels"
                )
