"""How large a field the patches of a set show, in micrometres, and whether sets agree in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from latentds.errors import ContractError
from latentds.reader import ShardSet

logger = logging.getLogger(__name__)

TOLERANCE = 0.05  # scanners of one magnification differ by that much
SAMPLE = 4096  # patches of a set


def mpp_of(shards: ShardSet) -> float | None:
    """Median micrometres a pixel of patches spread over a set; None where none tells."""
    step = max(len(shards) // SAMPLE, 1)
    values = np.asarray(shards.patches["mpp"][::step], np.float64)
    known = values[np.isfinite(values) & (values > 0)]
    return float(np.median(known)) if len(known) else None


def field_um(shards: ShardSet) -> float | None:
    """Edge of what a patch shows, in micrometres; None where its mpp is not known."""
    mpp = mpp_of(shards)
    height, width = shards.manifest.contract.patch_px
    return None if mpp is None else mpp * (height * width) ** 0.5


def check_fields(sets: Sequence[ShardSet], allow: bool = False) -> None:
    """Refuse to mix sets whose patches show fields of unlike size.

    Views are resized to one number of pixels: with fields of one size, a pixel of a view stands for
    one size too, whatever the patches' own. Sets that do not tell are warned of.

    allow   mix them anyway
    raises  ContractError where two fields differ by more than 5 %
    """
    if len(sets) < 2:
        return
    known = [(field, shards) for shards in sets if (field := field_um(shards)) is not None]
    silent = [shards.folder for shards in sets if field_um(shards) is None]
    if silent:
        logger.warning(
            "micrometres a pixel are not recorded in %s: whether a pixel of a view is as large "
            "there as in the other sets is not known", ", ".join(silent),
        )  # fmt: skip
    if allow or not known:
        return
    (least, small), (most, large) = min(known, key=first), max(known, key=first)
    if most > least * (1 + TOLERANCE):
        raise ContractError(
            f"{describe(small, least)}, {describe(large, most)}: a pixel of a view would have two "
            "sizes. Convert them at one --mpp, or mix them so with allow_mixed_mpp=True "
            "(--allow-mixed-mpp)"
        )


def first(pair: tuple[float, ShardSet]) -> float:
    """The field."""
    return pair[0]


def describe(shards: ShardSet, field: float) -> str:
    """A set and its field in words."""
    height, width = shards.manifest.contract.patch_px
    return (
        f"{shards.folder}: patches of {width}x{height} px at {mpp_of(shards):.4g} um a pixel show "
        f"{field:.4g} um"
    )
