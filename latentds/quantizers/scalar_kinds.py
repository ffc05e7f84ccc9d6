"""Kinds of scalar codebooks. A new kind is a function here and an entry of KINDS.

Options, their help and codecs' names follow from KINDS. No heavy import: helps are built from it.
"""
# M values of a row, K levels

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    import numpy as np

ITERATIONS = 20  # from the companding start; the moves that follow end where 100 would have led
TAIL = 1e-4  # share of the values that int8-percentile leaves beyond each end


@dataclasses.dataclass(frozen=True)
class ScalarKind:
    """How the levels of a row are found.

    fit      ascending float32 (M,) values and K to ascending float32 (K,) levels
    summary  for helps
    is_per_channel  a row of levels for each channel, not one for all
    is_fixed  always 256 levels: codecs' names give it none
    """

    fit: Callable[[np.ndarray, int], np.ndarray]
    summary: str
    is_per_channel: bool = False
    is_fixed: bool = True


def fit_kmeans(values: np.ndarray, levels: int) -> np.ndarray:
    """K-means centroids of ascending 1-D values, ascending.

    faiss from a companding start, then moves between cells. faiss's own start, random points, ends
    8 to 14 dB below the optimum for 256 centroids in one dimension; the start alone leaves up to 4
    dB of a heavy tail, since Lloyd steps keep the number of centroids in a stretch; the moves bring
    it to 0.4 dB.
    """
    import faiss
    import numpy as np

    from latentds.core.lloyd import relocate

    distinct = np.unique(values)
    if len(distinct) <= levels:
        return np.pad(distinct, (0, levels - len(distinct)), mode="edge").astype(np.float32)
    start = companding_levels(values, levels).astype(np.float32)
    kmeans = faiss.Kmeans(
        1, levels, niter=ITERATIONS, max_points_per_centroid=len(values), min_points_per_centroid=1
    )
    kmeans.train(values.reshape(-1, 1), init_centroids=start.reshape(-1, 1))
    centroids = np.sort(np.asarray(kmeans.centroids, np.float64).reshape(-1))
    return relocate(values, centroids).astype(np.float32)


def companding_levels(values: np.ndarray, levels: int) -> np.ndarray:
    """Ascending levels spaced as an optimal compander's: density to the 1/3 (Panter and Dite 1951).

    The density is read off the gaps between ascending values, not off a histogram of even bins,
    which a heavy tail leaves empty: over a gap of width d its cube root integrates to d^(2/3).
    """
    import numpy as np

    cumulative = np.append(0.0, np.cumsum(np.diff(values.astype(np.float64)) ** (2 / 3)))
    wanted = (np.arange(levels) + 0.5) / levels * cumulative[-1]
    start: np.ndarray = np.interp(wanted, cumulative, values)
    return start


def fit_range(values: np.ndarray, levels: int) -> np.ndarray:
    """Evenly spaced levels from the smallest to the largest value, both included."""
    import numpy as np

    return np.linspace(values[0], values[-1], levels, dtype=np.float32)


def fit_percentiles(values: np.ndarray, levels: int) -> np.ndarray:
    """Evenly spaced levels over all values but a share of TAIL at each end."""
    import numpy as np

    return fit_range(np.quantile(values, [TAIL, 1 - TAIL]), levels)


KINDS = {
    "kmeans": ScalarKind(fit_kmeans, "the paper's one table of centroids", is_fixed=False),
    "kmeans-channel": ScalarKind(
        fit_kmeans, "a table a channel", is_per_channel=True, is_fixed=False
    ),
    "int8-minmax": ScalarKind(fit_range, "even levels over the range"),
    "int8-percentile": ScalarKind(fit_percentiles, "even levels over all but 1e-4 at each end"),
    "int8-channel": ScalarKind(fit_range, "even levels over each channel's", is_per_channel=True),
}


def check_kind(kind: str) -> str:
    """The kind; ValueError for one that is not in KINDS."""
    if kind not in KINDS:
        raise ValueError(f"unknown quantizer {kind!r}; known: {', '.join(KINDS)}")
    return kind


# The type of an option that names a kind.
KindName = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="KIND",
        instance_from_str=lambda words: check_kind(words[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
    tyro.conf.arg(
        help="How latents become bytes, one by one: "
        + "; ".join(f"{name}, {kind.summary}" for name, kind in KINDS.items())
        + "."
    ),
]
