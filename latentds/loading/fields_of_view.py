"""How large a field the patches of a set show, in micrometres, and whether sets agree in it."""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Sequence

import numpy as np

from latentds.errors import ContractError
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # scanners of one magnification differ by that much
SAMPLE = 4096  # patches of a set
FEW = 16  # patches of a set to warn by: of a large remote one each is a request


@dataclasses.dataclass(frozen=True)
class Field:
    """What the patches of a set's split show.

    mpp          median micrometres a pixel of patches spread over it
    least, most  of the same patches
    edge_um      edge of what a patch shows at the median, in micrometres
    """

    shards: ShardSet
    mpp: float
    least: float
    most: float
    edge_um: float


def field_of(shards: ShardSet, split: str | None = None, sample: int = SAMPLE) -> Field | None:
    """The field of a split, or of the whole set; None where no patch tells its mpp.

    sample  patches to look at, about
    raises  UnknownNameError for a split that is not there
    """
    first, end = (0, len(shards)) if split is None else shards.patch_range(split)
    step = max((end - first) // sample, 1)
    values = np.asarray(shards.patches[first:end:step]["mpp"], np.float64)
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return None
    mpp = float(np.median(known))
    height, width = shards.manifest.contract.patch_px
    edge_um = mpp * (height * width) ** 0.5
    return Field(shards, mpp, float(known.min()), float(known.max()), edge_um)


def check_fields(sets: Sequence[ShardSet], allow: bool = False, split: str | None = None) -> None:
    """Refuse to mix sets whose patches show fields of unlike size.

    Views are resized to one number of pixels: with fields of one size, a pixel of a view stands for
    one size too, whatever the patches' own. Sets that do not tell, and sets whose own patches
    differ, are warned of.

    allow   mix them anyway
    split   that is trained on; None looks at whole sets
    raises  ContractError where the medians of two sets differ by more than 5 %, UnknownNameError
            for a split that is not there
    """
    found = [field_of(shards, split) for shards in sets]
    known = [field for field in found if field is not None]
    silent = [shards.folder for shards, field in zip(sets, found, strict=True) if field is None]
    if silent and len(sets) > 1:
        logger.warning(
            "micrometres a pixel are not recorded in %s: whether a pixel of a view is as large "
            "there as in the other sets is not known", ", ".join(silent),
        )  # fmt: skip
    if allow or not known:
        return
    for field in known:
        if field.most > field.least * (1 + TOLERANCE):
            logger.warning(
                "%s: patches from %.4g to %.4g um a pixel in one set, the median %.4g stands for "
                "it: a pixel of a view has several sizes; convert at one --mpp, or leave some out",
                field.shards.folder, field.least, field.most, field.mpp,
            )  # fmt: skip
    if are_unlike(known):
        by_edge = operator.attrgetter("edge_um")
        small, large = min(known, key=by_edge), max(known, key=by_edge)
        raise ContractError(
            f"{describe(small)}, {describe(large)}: a pixel of a view would have two sizes. "
            "Convert them at one --mpp, or mix them so with allow_mixed_mpp=True "
            "(--allow-mixed-mpp)"
        )


def warn_of_fields(sets: Sequence[ShardSet], split: str | None = None) -> None:
    """Tell of sets joined whose patches show fields of unlike size; reads a few rows of each.

    Sets that do not record micrometres a pixel are not compared.
    """
    found = [field_of(shards, split, FEW) for shards in sets] if len(sets) > 1 else []
    known = [field for field in found if field is not None]
    if known and are_unlike(known):
        logger.warning(
            "%s: their pixels are of unlike size, and are mixed so; where that is not meant, "
            "convert them at one --mpp", "; ".join(map(describe, known)),
        )  # fmt: skip


def are_unlike(fields: Sequence[Field]) -> bool:
    """Whether the largest of some fields is larger than the smallest by more than 5 %."""
    edges = [field.edge_um for field in fields]
    return max(edges) > min(edges) * (1 + TOLERANCE)


def describe(field: Field) -> str:
    """A set and its field in words."""
    height, width = field.shards.manifest.contract.patch_px
    return (
        f"{field.shards.folder}: patches of {width}x{height} px at {field.mpp:.4g} um a pixel show "
        f"{field.edge_um:.4g} um"
    )
