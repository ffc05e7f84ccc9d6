"""Latents into integers and classes on the CPU, a patch at a time, in machine code by Numba.

Compiled at the first use, some 20 seconds with `native_streams`, and kept in the cache folder
beside this file (or in the user's, if that is read-only).
"""
# B patches, C latent channels, N h*w cells in scan order, P parents of a channel, K classes,
# S symbols

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numba
import numpy as np

from latentds.quantizers.entropy.native_model import Model
from latentds.quantizers.entropy.rans import COST_BITS, LARGEST

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])


logger = logging.getLogger(__name__)
SOURCES = hashlib.sha256(
    b"".join(
        Path(__file__).with_name(name).read_bytes()
        for name in ("native_rounding.py", "native_streams.py", "native_model.py", "rans.py")
    )
).hexdigest()[:12]


def compiled(function: Function) -> Function:
    """The function in machine code that does not hold the interpreter's lock.

    Kept beside the file or in the user's cache; compiled in every process where neither can be
    written to.
    """
    # Part of the kept code's name: Numba looks at the changes of one file, code is of several.
    function.__qualname__ = f"{function.__name__}_{SOURCES}"
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        return cast("Function", numba.njit(cache=True, **options)(function))
    except RuntimeError:  # Numba's for having no such folder
        return cast("Function", numba.njit(**options)(function))


def inner(function: Function) -> Function:
    """As `compiled`, to be called by compiled code alone: less to compile."""
    options: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # not in its types
    decorator: Any = numba.njit(nogil=True, error_model="numpy", **options)
    return cast("Function", decorator(function))


@inner
def blur(
    magnitudes: np.ndarray,
    cells: np.ndarray,
    width: int,
    raster: np.ndarray,
    lines: np.ndarray,
    out: np.ndarray,
) -> None:
    """3x3 sums weighted 1 2 1 of (N,) in scan order, edge cells repeated outside."""
    count = len(cells)
    for place in range(count):
        raster[cells[place]] = magnitudes[place]
    for cell in range(count):
        above = cell - width if cell >= width else cell
        below = cell + width if cell + width < count else cell
        lines[cell] = raster[above] + 2 * raster[cell] + raster[below]
    for place in range(count):
        cell = cells[place]
        x = cell % width
        left = cell - 1 if x > 0 else cell
        right = cell + 1 if x < width - 1 else cell
        out[place] = lines[left] + 2 * lines[cell] + lines[right]


@inner
def name_classes(
    weights: np.ndarray,
    thresholds: np.ndarray,
    parents: np.ndarray,
    neighbours: np.ndarray,
    magnitudes: np.ndarray,
    blurred: np.ndarray,
    classes: np.ndarray,
    expected: np.ndarray,
) -> None:
    """Fill classes (n,) of a phase's cells of a channel: how many thresholds a cell's expected
    magnitude reaches.

    weights     (P + 2,) of the phase: a constant, the cells around, the parents
    neighbours  (4, n), places of the cells around; (4, 0) in the first phase
    magnitudes  (N,) of the channel, known in the phases before
    blurred     (C, n) of the phase's cells, of the channels coded before
    expected    (n,) to work in
    """
    expected[:] = weights[0]
    for place in range(neighbours.shape[1]):
        around = 0
        for side in range(4):
            around += magnitudes[neighbours[side, place]]
        expected[place] += weights[1] * 4 * around
    for number in range(len(parents)):
        weight, row = weights[2 + number], blurred[max(parents[number], 0)]
        if weight != 0:
            for place in range(len(expected)):
                expected[place] += weight * row[place]
    classes[:] = 0
    for threshold in thresholds:
        for place in range(len(expected)):
            classes[place] += expected[place] >= threshold


@compiled
def find_classes(integers: np.ndarray, model: Model, classes: np.ndarray) -> None:
    """Fill classes int32 (C, N) of integers int32 (C, N)."""
    channels, count = integers.shape
    magnitudes, raster, lines = np.empty((3, count), np.int32)
    blurred, expected = np.zeros((channels, count), np.int32), np.empty(count, np.int32)
    for channel in model.order:
        cap = model.caps[channel]
        for place in range(count):
            magnitudes[place] = min(abs(integers[channel, place]), cap)
        first = 0
        for phase in range(3):
            end = model.ends[phase]
            name_classes(
                model.weights[channel, phase], model.thresholds[channel], model.parents[channel],
                model.neighbours[:, first if phase else end : end], magnitudes,
                blurred[:, first:end], classes[channel, first:end], expected[first:end],
            )  # fmt: skip
            first = end
        if model.is_parent[channel]:
            blur(magnitudes, model.cells, model.width, raster, lines, blurred[channel])


@inner
def round_nearest(values: np.ndarray, step: float, integers: np.ndarray) -> None:
    """Fill integers (C, N), within -128..128, of values float32 (C, N)."""
    limit = np.float32(LARGEST + 1)
    for channel in range(integers.shape[0]):
        for place in range(integers.shape[1]):
            nearest = min(max(np.rint(values[channel, place] / step), -limit), limit)
            integers[channel, place] = np.int32(nearest)


@inner
def round_down(
    values: np.ndarray,
    step: float,
    model: Model,
    rate_weight: float,
    integers: np.ndarray,
    classes: np.ndarray,
) -> None:
    """Take the next integer towards zero where squared error + rate_weight * bits is less."""
    two, one, scale = np.float32(2), np.float32(1), np.float32(rate_weight / (1 << COST_BITS))
    escape = model.costs.shape[2] - 1
    for channel in range(integers.shape[0]):
        extent, savings = model.extents[channel], model.savings[:, channel]
        for place in range(integers.shape[1]):
            integer = integers[channel, place]
            size = abs(integer)
            if size == 0:
                continue
            exact = abs(values[channel, place] / step)
            symbol = escape if size > extent else integer + model.magnitude
            worth = savings[classes[channel, place], symbol] * scale
            if (exact - np.float32(size)) * two + one < worth:  # (e + 1)^2 - e^2
                integers[channel, place] -= 1 if integer > 0 else -1


@compiled
def round_all(
    values: np.ndarray,
    levels: np.ndarray,
    model: Model,
    rate_weight: float,
    integers: np.ndarray,
    classes: np.ndarray,
) -> None:
    """Fill integers and classes int32 (B, C, N) of values float32 (B, C, N) at levels (B,).

    The nearest within -128..128, or the next towards zero where squared error + rate_weight * bits
    is less by the tables that the nearest name; zero in the channels that the level drops. The
    classes are those of the result.
    """
    channels, last = values.shape[1], len(model.steps) - 1
    for patch in range(len(values)):
        level, found, names = levels[patch], integers[patch], classes[patch]
        step = model.steps[min(level, last)]
        round_nearest(values[patch], step, found)
        for is_final in range(0 if rate_weight > 0 else 1, 2):  # one call, compiled once
            if is_final:
                for rank in range(max(0, channels - max(level - last, 0)), channels):
                    found[model.order[rank]] = 0
            find_classes(found, model, names)
            if not is_final:
                round_down(values[patch], step, model, rate_weight, found, names)


@compiled
def price_all(
    integers: np.ndarray, classes: np.ndarray, model: Model, bits: np.ndarray, beyond: np.ndarray
) -> None:
    """Fill bits (B,): what the tables say integers int32 (B, C, N) take, in 1/256 bit.

    beyond  (B,), filled with whether an integer is larger than a byte may be
    """
    escape = model.costs.shape[2] - 1
    for patch in range(len(integers)):
        bits[patch], beyond[patch] = 0, False
        for channel in range(integers.shape[1]):
            extent, costs = model.extents[channel], model.costs[:, channel]
            for place in range(integers.shape[2]):
                integer = integers[patch, channel, place]
                symbol = escape if abs(integer) > extent else integer + model.magnitude
                bits[patch] += costs[classes[patch, channel, place], symbol]
                beyond[patch] |= abs(integer) > LARGEST


def is_kept(function: Any) -> bool:
    """Whether an earlier process left a compiled function's machine code."""
    folder = getattr(getattr(function, "stats", None), "cache_path", None)  # none without Numba's
    name = f"{Path(__file__).stem}.{function.__name__}_{SOURCES}-*.nbi"
    return folder is not None and any(Path(folder).glob(name))


if not is_kept(round_all):
    logger.info("compiling what codes records: some 15 s, once in an environment")
