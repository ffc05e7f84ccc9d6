"""What few need to say to a loader, in groups: which patches, in which order, by whom."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

P = ParamSpec("P")
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
    "generator": BY_SEED,
    "worker_init_fn": f"{BY_SEED}, and workers only read",
    "persistent_workers": "workers stay between epochs as they are",
    "timeout": "a worker that dies is told of by WorkerError as it is",
    "in_order": "batches always come in order",
    "dataset": "the first argument is a set's folder or location",
}


def check_group(value: object, kind: type[object], name: str) -> None:
    """TypeError where a group of options is not given as one, `select="x > 5"` for example."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}={value!r}: pass {name}={kind.__name__}(...), as its help has it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select:
    """Which patches of a split, and how often each is drawn.

    where    condition on label, slide, patient, x, y, mpp, size_px, as in
             "label == 'TUM' and mpp < 0.6"
    slides   names of the slides to use
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

    @property
    def chooses(self) -> bool:
        """Whether patches may be left out."""
        return (self.where, self.slides) != (None, None) or self.rows is not None

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


def answering(init: Callable[P, None]) -> Callable[P, None]:
    """A reader's constructor whose TypeError for another loader's word names what to pass."""

    @functools.wraps(init)
    def constructor(*given: P.args, **named: P.kwargs) -> None:
        if not named.keys() <= init.__annotations__.keys():
            known = ANSWERS | outside_groups(getattr(init, "__kwdefaults__", None) or {})
            for word in sorted(named.keys() & known.keys() - init.__annotations__.keys()):
                raise TypeError(f"{type(given[0]).__name__} takes no {word}=: {known[word]}")
        init(*given, **named)

    return constructor


def outside_groups(defaults: Mapping[str, Any]) -> dict[str, str]:
    """What to say of an option that is passed without its group, by the constructor's defaults."""
    groups: dict[str, Any] = {
        name: type(value) for name, value in defaults.items() if dataclasses.is_dataclass(value)
    }
    if "num_workers" in defaults:
        groups["num_workers"] = Workers
    return {
        field.name: f"pass {name}={group.__name__}({field.name}=...)"
        for name, group in groups.items()
        for field in dataclasses.fields(group)
    }
