"""Latents into records of equal size: rounding that weighs bytes, the finest step, the streams."""
# B patches, C latent channels, h w latent cells (in scan order where flat), R record bytes

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from latentds.errors import InputError, ShapeError
from latentds.quantizers.entropy.contexts import scan_of
from latentds.quantizers.entropy.native_model import native_model
from latentds.quantizers.entropy.rans import COST_BITS, HEAD_BYTES, LARGEST
from latentds.quantizers.entropy.record_model import RecordModel

CHUNK = 256  # patches encoded at a time: some 100 MB
# Bytes of a stream that its symbols' costs do not tell: the first states hold half a word on
# average that is counted twice, the quiet turns' least states a few bits. 2.3 a lane is what 40
# crops of UCSB took more than their symbols, six bytes spare most second tries.
LANE_BYTES, MARGIN_BYTES = 2.3, 6
# Octaves of bytes for an octave of the step, for the next guess of the step; 0.6 to 1.2 are seen.
SLOPE = 0.9
MOST_SECANTS = 6  # then halves: a secant may crawl


def check_latents(latents: Tensor, codebook: RecordModel) -> None:
    """Raise unless latents are (B, *latents_shape) and finite."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != codebook.latents_shape:
        raise ShapeError(
            f"latents of shape {tuple(latents.shape)}; the codebook is for (B, "
            f"{', '.join(map(str, codebook.latents_shape))})"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents contain NaN or infinity; encode in float32")


def encode_records(latents: Tensor, codebook: RecordModel, rate_weight: float) -> Tensor:
    """See `EntropyCodebook.quantize`."""
    check_latents(latents, codebook)
    check_reach(codebook)
    records = np.empty((len(latents), codebook.record_bytes), np.uint8)
    for first in range(0, len(records), CHUNK):
        part = slice(first, first + CHUNK)
        encode_chunk(in_scan(latents[part], codebook), codebook, rate_weight, records[part])
    return torch.from_numpy(records).to(latents.device)


def encode_chunk(
    values: np.ndarray, codebook: RecordModel, rate_weight: float, records: np.ndarray
) -> None:
    """Fill the records: the level by the tables' costs, then tried and made coarser."""
    levels = finest_levels(values, codebook, rate_weight)
    pending = np.arange(len(levels))
    while len(pending):
        part = values if len(pending) == len(values) else values[pending]
        integers, classes = integers_at(part, levels[pending], codebook, rate_weight)
        tried, fits = write_records(integers, classes, levels[pending], codebook)
        records[pending[fits]] = tried[fits]
        pending = pending[~fits]
        levels[pending] += 1
        if len(pending) and levels[pending].max() > coarsest_level(codebook):
            raise InputError(
                f"records of {codebook.record_bytes} bytes: a patch does not fit even "
                "as zeros; use some bytes more"
            )


def coarsest_level(codebook: RecordModel) -> int:
    """Levels are the steps, then the last step with ever more channels dropped, at last all."""
    return len(codebook.steps) - 1 + codebook.latents_shape[0]


def by_patch(work: Callable[[slice], None], count: int) -> None:
    """Do the work on all of `count` patches, with as many threads as torch would use."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        return work(slice(0, count))
    ends = [count * number // threads for number in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, ends[:-1], ends[1:])))


def in_scan(latents: Tensor, codebook: RecordModel) -> np.ndarray:
    """Latents (B, C, h, w) times their gains, float32 (B, C, h*w) in scan order."""
    flat = latents.detach().to("cpu", torch.float32).flatten(2).numpy()
    scan = scan_of(*codebook.latents_shape[1:])
    values: np.ndarray = flat.take(scan.cells, axis=2) * codebook.gains[:, None]
    return values


def finest_levels(values: np.ndarray, codebook: RecordModel, rate_weight: float) -> np.ndarray:
    """int64 (B,): the level whose expected bytes fit while those of the next finer do not.

    A search by secants between bounds; every patch's is its own, whatever the others need.
    """
    budget = codebook.record_bytes - MARGIN_BYTES
    octaves = torch.from_numpy(codebook.steps.copy()).log2()
    low = torch.full((len(values),), -1)  # does not fit
    high = torch.full_like(low, coarsest_level(codebook))  # fits
    guess = torch.full_like(low, len(codebook.steps) // 2).minimum(high)
    # Of the trial before: the step's octave, the octaves of bytes above the budget, their slope.
    place, above = (torch.full((len(low),), torch.nan) for _ in range(2))
    slope = torch.full((len(low),), -SLOPE)
    for trial in range(len(octaves) + len(codebook.order)):
        pending = (high - low > 1).nonzero()[:, 0]
        if not len(pending):
            break
        tried = guess[pending]
        part = values if len(pending) == len(low) else values[pending.numpy()]
        size = torch.from_numpy(expected_bytes(part, tried.numpy(), codebook, rate_weight))
        fits, now = size <= budget, (size / budget).log2().clamp(-3, 3)
        low[pending] = torch.where(fits, low[pending], tried)
        high[pending] = torch.where(fits, tried, high[pending])
        here = octaves[tried.clamp(max=len(octaves) - 1)]
        found = (now - above[pending]) / (here - place[pending])
        # One that is nearly flat would send the next guess far away.
        slope[pending] = torch.where(found < -SLOPE / 4, found, slope[pending])
        place[pending], above[pending] = here, now
        guess = torch.searchsorted(octaves, place - above / slope)
        if trial > MOST_SECANTS:
            guess = (low + high) // 2
        guess = guess.maximum(low + 1).minimum(high - 1)
    return high.numpy()


def integers_at(
    values: np.ndarray, levels: np.ndarray, codebook: RecordModel, rate_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Integers at the levels' steps and their classes, int32 (B, C, h*w); see `round_all`."""
    from latentds.quantizers.entropy import native_rounding as native

    integers, classes = (np.empty(values.shape, np.int32) for _ in range(2))
    by_patch(
        lambda part: native.round_all(
            values[part], levels[part], native_model(codebook), float(rate_weight), integers[part],
            classes[part],
        ),
        len(values),
    )  # fmt: skip
    return integers, classes


def expected_bytes(
    values: np.ndarray, levels: np.ndarray, codebook: RecordModel, rate_weight: float
) -> np.ndarray:
    """int64 (B,): bytes of records at these levels, by the tables; very many where not allowed."""
    integers, classes = integers_at(values, levels, codebook, rate_weight)
    bits, beyond = bits_by_tables(integers, classes, codebook)
    beyond &= levels < len(codebook.steps) - 1
    size = (bits >> COST_BITS) // 8 + HEAD_BYTES + int(LANE_BYTES * codebook.lanes)
    return np.where(beyond, 1 << 40, size)


def bits_by_tables(
    integers: np.ndarray, classes: np.ndarray, codebook: RecordModel
) -> tuple[np.ndarray, np.ndarray]:
    """int64 (B,) 1/256 bits of integers int32 (B, C, h*w); bool (B,): one is beyond a byte."""
    from latentds.quantizers.entropy import native_rounding as native

    bits, beyond = np.empty(len(integers), np.int64), np.empty(len(integers), np.bool_)
    by_patch(
        lambda part: native.price_all(
            integers[part], classes[part], native_model(codebook), bits[part], beyond[part]
        ),
        len(integers),
    )
    return bits, beyond


def write_records(
    integers: np.ndarray, classes: np.ndarray, levels: np.ndarray, codebook: RecordModel
) -> tuple[np.ndarray, np.ndarray]:
    """Records uint8 (B, R) of integers int32 (B, C, h*w), and bool (B,) which are whole."""
    from latentds.quantizers.entropy import native_streams as streams

    integers.clip(-LARGEST, LARGEST, out=integers)
    records = np.empty((len(integers), codebook.record_bytes), np.uint8)
    fits = np.empty(len(integers), np.bool_)
    by_patch(
        lambda part: streams.write_all(
            integers[part], classes[part], levels[part], native_model(codebook), records[part],
            fits[part],
        ),
        len(integers),
    )  # fmt: skip
    return records, fits


@functools.lru_cache(maxsize=16)
def check_reach(codebook: RecordModel) -> None:
    """ValueError unless every patch can be brought down to the record's bytes.

    Of the encoder alone: a reader takes whatever records were written.
    """
    least = least_bytes(codebook)
    if least > codebook.record_bytes:
        raise ValueError(
            f"records of {codebook.record_bytes} bytes; these tables and {codebook.lanes} lanes "
            f"need {least} for any patch. Use more bytes, or additive codes: these latents are too "
            "far from 0 for entropy-coded records of this size"
        )


def most_bytes(latents_shape: tuple[int, int, int]) -> int:
    """Bytes beyond which records are not worth having: a byte a value, as scalar codes take."""
    return HEAD_BYTES + math.prod(latents_shape)


def least_bytes(codebook: RecordModel) -> int:
    """About the bytes that any patch can be brought down to: those of nothing but zeros."""
    channels, height, width = codebook.latents_shape
    zeros, level = np.zeros((1, channels, height * width), np.float32), np.zeros(1, np.int64)
    least = int(expected_bytes(zeros, level, codebook, 0)[0]) + MARGIN_BYTES
    return least


def least_record(codebook: RecordModel) -> int:
    """Bytes of the smallest record into which zeros fit, by trial.

    Where a lane has few cells, its end takes more than `least_bytes` reckons with.
    """
    channels, height, width = codebook.latents_shape
    zeros, level = np.zeros((1, channels, height * width), np.float32), np.zeros(1, np.int64)
    integers, classes = integers_at(zeros, level, codebook, 0)
    tried = dataclasses.replace(codebook, record_bytes=least_bytes(codebook))
    while not write_records(integers, classes, level, tried)[1][0]:
        tried = dataclasses.replace(codebook, record_bytes=tried.record_bytes + 1)
    return tried.record_bytes


def round_at_steps(
    latents: Tensor, step_index: Tensor, codebook: RecordModel
) -> tuple[Tensor, Tensor]:
    """The points that latents would be decoded as, and what their bits do there.

    latents     float32 (B, C, h, w), finite
    step_index  int64 (B,), each patch's step
    returns     points float32 (B, C, h, w); pull float32 (B, C, h, w): squared units of the step,
                over a unit of the latents, times bits. It is the slope of the tables' costs between
                the integers on both sides of a value, under the classes that the rounded
                neighbours name: the bits of an integer drawn on either side, with the value as
                mean. Both on the latents' device
    """
    values, levels = in_scan(latents, codebook), step_index.cpu().numpy()
    steps = codebook.steps[levels][:, None, None]
    integers, classes = integers_at(values, levels, codebook, codebook.rate_weight)
    slopes = bits_slopes(values / steps, classes, codebook)
    points, pull = (from_scan(found * steps, codebook) for found in (integers, slopes))
    return points.to(latents.device), pull.to(latents.device)


def bits_slopes(exact: np.ndarray, classes: np.ndarray, codebook: RecordModel) -> np.ndarray:
    """float32 (B, C, h*w): bits that a unit more of values (in steps) takes, cells in scan order.

    classes  int32 (B, C, h*w), of the integers that the values are rounded to
    """
    costs, channel = native_model(codebook).costs, np.arange(exact.shape[1])[:, None]
    below = np.floor(exact).clip(-codebook.magnitude, codebook.magnitude - 1).astype(np.int64)

    def costs_of(integers: np.ndarray) -> np.ndarray:
        is_escape = np.abs(integers) > codebook.extents[:, None]
        symbols = np.where(is_escape, costs.shape[2] - 1, integers + codebook.magnitude)
        found: np.ndarray = costs[classes, channel, symbols]
        return found

    slopes: np.ndarray = (costs_of(below + 1) - costs_of(below)) / np.float32(1 << COST_BITS)
    return slopes.astype(np.float32)


def from_scan(values: np.ndarray, codebook: RecordModel) -> Tensor:
    """Latents (B, C, h, w) of values (B, C, h*w) in scan order, their gains taken off."""
    scan = scan_of(*codebook.latents_shape[1:])
    cells = (values / codebook.gains[:, None]).astype(np.float32).take(scan.inverse, axis=2)
    return torch.from_numpy(cells).view(-1, *codebook.latents_shape)
