"""A codebook's numbers as compiled code reads them, made once; without torch."""
# C channels, P parents of a channel, K classes, S symbols, N cells

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from latentds.quantizers.entropy import rans
from latentds.quantizers.entropy.contexts import CAP, scan_of
from latentds.quantizers.entropy.record_model import RecordModel

ESCAPE_BITS = 8


class Model(NamedTuple):
    """A codebook as compiled code reads it.

    steps                        float32 (steps,)
    order                        int64 (C,), channels as coded
    parents, weights, thresholds int64 (C, P), (C, 3, P + 2), (C, K - 1)
    caps, extents                int64 (C,): what neighbours see at most; what needs no escape
    is_parent                    bool (C,)
    frequencies, starts, costs   int64 (K, C, S), a symbol's interval and 1/256 bits
    savings                      float32 (K, C, S): squared steps that the next integer towards
                                 zero is worth; 0 for zero and for escapes
    decoding                     int32 (C, K, 4096) of `rans.decoding_table`
    cells                        int64 (N,), raster place of each place of the scan
    neighbours                   int64 (4, N), places in the scan; 0 in the first phase
    ends                         int64 (3,), where each phase ends in the scan
    width, lanes, magnitude
    """

    steps: np.ndarray
    order: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray
    caps: np.ndarray
    extents: np.ndarray
    is_parent: np.ndarray
    frequencies: np.ndarray
    starts: np.ndarray
    costs: np.ndarray
    savings: np.ndarray
    decoding: np.ndarray
    cells: np.ndarray
    neighbours: np.ndarray
    ends: np.ndarray
    width: int
    lanes: int
    magnitude: int


@functools.lru_cache(maxsize=16)
def native_model(codebook: RecordModel) -> Model:
    """The codebook as compiled code reads it."""
    scan = scan_of(*codebook.latents_shape[1:])
    classes, channels, symbols = codebook.tables.shape
    # Another layout of an array would be compiled anew.
    whole = functools.partial(np.asarray, dtype=np.int64, order="C")
    frequencies = whole(codebook.tables)
    bits = rans.PRECISION_BITS - np.log2(np.maximum(frequencies, 1))
    bits[:, :, -1] += ESCAPE_BITS
    costs = np.rint(bits * (1 << rans.COST_BITS)).astype(np.int64)
    values = np.arange(symbols - 1) - codebook.magnitude
    savings = np.zeros(costs.shape, np.float32)
    savings[..., :-1] = costs[..., :-1] - costs[..., np.arange(symbols - 1) - np.sign(values)]
    first = np.zeros((4, scan.ends[0]), np.int64)
    decoding = decoding_rows(codebook)[: -rans.TOTAL]
    return Model(
        steps=codebook.steps.copy(),
        order=whole(codebook.order),
        parents=whole(codebook.parents),
        weights=whole(codebook.weights),
        thresholds=whole(codebook.thresholds),
        caps=whole(np.minimum(codebook.extents + 1, CAP)),
        extents=whole(codebook.extents),
        is_parent=np.isin(np.arange(channels), codebook.parents),
        frequencies=frequencies,
        starts=frequencies.cumsum(2) - frequencies,
        costs=costs,
        savings=savings,
        decoding=decoding.reshape(classes, channels, -1).swapaxes(0, 1).copy(),
        cells=scan.cells,
        neighbours=np.concatenate([first, *scan.neighbours], 1),
        ends=np.array(scan.ends),
        width=codebook.latents_shape[2],
        lanes=codebook.lanes,
        magnitude=codebook.magnitude,
    )


def decoding_rows(codebook: RecordModel) -> np.ndarray:
    """int32 ((K * C + 1) * 4096); the last row is of one symbol, which takes no bits."""
    rows = codebook.tables.reshape(-1, codebook.tables.shape[2])
    idle = np.zeros((1, rows.shape[1]), rows.dtype)
    idle[0, 0] = rans.TOTAL
    return rans.decoding_table(np.concatenate([rows, idle]))


def decoded_values(codebook: RecordModel) -> np.ndarray:
    """float32 (steps, C): what an integer's unit is worth."""
    scales: np.ndarray = codebook.steps[:, None] / codebook.gains[None, :]
    return scales
