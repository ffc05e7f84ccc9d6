"""What few need to say to a loader, in groups: a mixture of sets, which patches, order, by whom."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentds.errors import ContractError, InputError
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.format import alike_names, joined_names
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)


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
        if not weights or min(weights.values()) <= 0:
            raise ValueError(f"weights={dict(weights)}; at least one set, and every weight above 0")
        if epoch_patches is not None and epoch_patches < 1:
            raise ValueError(f"epoch_patches={epoch_patches}; at least 1")
        self.folders: list[str | os.PathLike[str]] = list(weights)
        self.weights = [float(weight) for weight in weights.values()]
        self.epoch_patches = epoch_patches


def as_mixture(folder: str | os.PathLike[str] | Mixture) -> Mixture:
    """A mixture, or one of a single set; TypeError for several sets that are none."""
    if isinstance(folder, Mixture):
        return folder
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"{folder!r}: pass a set's folder, or Mixture({{folder: weight, ...}})")
    return Mixture({folder: 1.0})


class Vocabulary:
    """What the numbers of several sets mean together.

    sets        they must share latent_id, encoding, shapes and patch size
    given       numbers of label names that others chose; InputError unless all names are among them
    classes     label names of all sets, in their own order where that is one; where numbers were
                given, by them, and "" for a number without a name
    codebooks   the distinct codebooks
    books       for every set, which of them its own ones are, by their number in its manifest
    """

    def __init__(self, sets: Sequence[ShardSet], given: Mapping[str, int] | None = None) -> None:
        check_mixable(sets)
        self.classes = joined_classes(sets, is_told=given is None)
        self.number = {name: index for index, name in enumerate(self.classes)}
        if given is not None:
            self.number = dict(given)
            self.classes = named_numbers(given, self.classes, sets[0].folder)
        # The last entry is for -1, no label.
        self.labels = [
            np.array([*(self.number[name] for name in shards.manifest.classes), -1])
            for shards in sets
        ]
        books: dict[str, AnyCodebook] = {}
        for shards in sets:
            for codebook in shards.manifest.codebooks:
                books.setdefault(codebook.codebook_id, codebook)
        self.codebooks = list(books.values())
        place = {identity: index for index, identity in enumerate(books)}
        self.books = [
            np.array([place[book.codebook_id] for book in shards.manifest.codebooks])
            for shards in sets
        ]


def joined_classes(sets: Sequence[ShardSet], is_told: bool = True) -> list[str]:
    """Label names of all sets; two that differ in case, spaces, - or _ alone are warned of."""
    classes = joined_names([shards.manifest.classes for shards in sets])
    if is_told and (alike := alike_names(classes)):
        logger.warning(
            "%s: classes %r and %r are two, and differ in case, spaces, - or _ alone; where they "
            "are one, convert anew with one name",
            ", ".join(str(shards.folder) for shards in sets), *alike,
        )  # fmt: skip
    return classes


def named_numbers(given: Mapping[str, int], names: Sequence[str], where: str) -> list[str]:
    """The names of `given` by their numbers; InputError where it cannot number `names`."""
    lost = [name for name in names if name not in given]
    if lost:
        raise InputError(
            f"{where}: class_to_idx has no number for {', '.join(map(repr, lost[:5]))} of its "
            f"{len(names)} classes; number them all, or leave some out by where="
        )
    numbers = list(given.values())
    if min(numbers, default=0) < 0 or len(set(numbers)) < len(numbers):
        raise InputError(f"{where}: class_to_idx {dict(given)}: numbers are 0 or more, each once")
    found = {number: name for name, number in given.items()}
    return [found.get(number, "") for number in range(max(numbers, default=-1) + 1)]


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
                    f"patch size merge, or mix in one batch. {remedy(sets[0], shards)}"
                )


def remedy(one: ShardSet, other: ShardSet) -> str:
    """What brings two unlike sets together."""
    contracts = [shards.manifest.contract for shards in (one, other)]
    places = [(c.latent_id, c.latents_shape, c.patch_px) for c in contracts]
    as_pixels = "latentds.loading.mixing.MixedLoader mixes them as pixels"
    if places[0] != places[1]:
        return f"{as_pixels}; to merge them, convert one as the other was"
    # What repacking aims at: sums before records, never levels; of one kind the fewer bytes.
    order = {"u8-sum": 0, "rans": 1, "u8": 2}
    (aim, _), (_, folder) = sorted(
        (
            (contract, shards.folder)
            for contract, shards in zip(contracts, (one, other), strict=True)
        ),
        key=lambda pair: (order[pair[0].encoding], pair[0].bytes_per_patch),
    )
    return (
        f"'latentds repack {folder} --out NEW --encoding {aim.encoding} --bytes "
        f"{aim.bytes_per_patch}' codes it as the other is; {as_pixels}"
    )
