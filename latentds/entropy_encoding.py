"""Latents into records of equal size: rounding that weighs bytes, the finest step, the streams."""
# B patches (the last dimension while encoding), C latent channels, h w latent cells (in scan
# order), L lanes, T turns, R record bytes

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentds import rans
from latentds.entropy_contexts import PHASES, scan_of
from latentds.entropy_tables import (
    COST_BITS,
    classes_at,
    costs_at,
    encoding_tables,
    places_at,
)
from latentds.errors import ShapeError

if TYPE_CHECKING:
    from latentds.entropy_codebook import EntropyCodebook

HEAD_BYTES = 4  # step, check, quiet turns (two)
LARGEST = 127  # absolute integer: an escape's is a byte
CHUNK = 64  # patches encoded at a time: some 100 MB
# What a bit is worth, in squared steps, when a value is rounded towards zero. At tiny-v2's 2,048
# bytes 0.1 dB better than the nearest on H&E, at 4,096 the same; 0.1 loses similarity.
RATE_WEIGHT = 0.04
# Bytes of a stream that its symbols' costs do not tell: the first states hold half a word on
# average that is counted twice, the quiet turns' least states a few bits. 2.3 a lane is what 40
# crops of UCSB took more than their symbols, six bytes spare most second tries.
LANE_BYTES, MARGIN_BYTES = 2.3, 6
# Octaves of bytes for an octave of the step, for the next guess of the step; 0.6 to 1.2 are seen.
SLOPE = 0.9
MOST_SECANTS = 6  # then halves: a secant may crawl


def check_latents(latents: Tensor, codebook: EntropyCodebook) -> None:
    """Raise unless latents are (B, *latents_shape) and finite."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != codebook.latents_shape:
        raise ShapeError(
            f"latents of shape {tuple(latents.shape)}; the codebook is for (B, "
            f"{', '.join(map(str, codebook.latents_shape))})"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents contain NaN or infinity; encode in float32")


def encode_records(latents: Tensor, codebook: EntropyCodebook, rate_weight: float) -> Tensor:
    """See `EntropyCodebook.quantize`."""
    check_latents(latents, codebook)
    check_reach(codebook)
    records = torch.empty((len(latents), codebook.record_bytes), dtype=torch.uint8)
    for first in range(0, len(latents), CHUNK):
        part = slice(first, first + CHUNK)
        values = in_scan(latents[part].detach().to("cpu", torch.float32), codebook)
        records[part] = encode_chunk(values, codebook, rate_weight)
    return records.to(latents.device)


def in_scan(latents: Tensor, codebook: EntropyCodebook) -> Tensor:
    """Latents times their gains, (h*w, C, B)."""
    scan = scan_of(*codebook.latents_shape[1:], latents.device)
    gains = torch.from_numpy(codebook.gains.copy()).to(latents.device)[:, None]
    return latents.flatten(2).permute(2, 1, 0).index_select(0, scan.cells) * gains


def encode_chunk(values: Tensor, codebook: EntropyCodebook, rate_weight: float) -> Tensor:
    """Records of a few patches: the level by the tables' costs, then tried and made coarser."""
    levels = finest_levels(values, codebook, rate_weight)
    records = torch.empty((len(levels), codebook.record_bytes), dtype=torch.uint8)
    pending = torch.arange(len(levels))
    while len(pending):
        part = values if len(pending) == len(levels) else values[:, :, pending]
        integers = integers_at(part, levels[pending], codebook, rate_weight)
        tried, fits = encode_integers(integers, levels[pending], codebook)
        records[pending[fits]] = tried[fits]
        pending = pending[~fits]
        levels[pending] += 1
    return records


def last_level(codebook: EntropyCodebook) -> int:
    """Levels of coarseness are the steps, then the last step with ever more channels dropped."""
    return len(codebook.steps) - 1 + codebook.latents_shape[0]


def finest_levels(values: Tensor, codebook: EntropyCodebook, rate_weight: float) -> Tensor:
    """int64 (B,): the level whose expected bytes fit while those of the next finer do not.

    A search by secants between bounds; every patch's is its own, whatever the others need.
    """
    budget = codebook.record_bytes - MARGIN_BYTES
    octaves = torch.from_numpy(codebook.steps.copy()).log2()
    low = torch.full((values.shape[2],), -1)  # does not fit
    high = torch.full_like(low, last_level(codebook))  # fits
    # Octaves of bytes above the budget at both bounds; unknown until a guess became the bound.
    above_low, above_high = (torch.full((len(low),), torch.nan) for _ in range(2))
    guess = torch.full_like(low, len(codebook.steps) // 2).minimum(high)
    for trial in range(len(octaves) + len(codebook.order)):
        pending = (high - low > 1).nonzero()[:, 0]
        if not len(pending):
            break
        tried = guess[pending]
        part = values if len(pending) == len(low) else values[:, :, pending]
        size = expected_bytes(part, tried, codebook, rate_weight)
        fits, above = size <= budget, (size / budget).log2().clamp(-3, 3)
        low[pending] = torch.where(fits, low[pending], tried)
        above_low[pending] = torch.where(fits, above_low[pending], above)
        high[pending] = torch.where(fits, tried, high[pending])
        above_high[pending] = torch.where(fits, above, above_high[pending])
        start, end = (octaves[bound.clamp(0, len(octaves) - 1)] for bound in (low, high))
        wanted = start + (end - start) * above_low / (above_low - above_high)
        first = octaves[guess.clamp(max=len(octaves) - 1)]
        first[pending] += above / SLOPE
        guess = torch.searchsorted(octaves, torch.where(wanted.isnan(), first, wanted))
        if trial > MOST_SECANTS:
            guess = (low + high) // 2
        elif trial > 1:  # the finest step of all may fit
            guess = guess.where(low >= 0, 0)
        guess = guess.maximum(low + 1).minimum(high - 1)
    return high


def integers_at(
    values: Tensor, levels: Tensor, codebook: EntropyCodebook, rate_weight: float
) -> Tensor:
    """int32 (h*w, C, B): integers at the level's step, zero in the channels that it drops.

    The nearest, or the next towards zero where squared error + rate_weight * bits is less; within
    -128..128.
    """
    last = len(codebook.steps) - 1
    steps = torch.from_numpy(codebook.steps.copy()).to(values.device)
    exact = values / steps[levels.clamp(max=last)]
    nearest = exact.round().clamp_(-LARGEST - 1, LARGEST + 1)
    integers = nearest.int()
    if rate_weight > 0:
        places = places_at(integers, classes_at(integers, codebook), codebook)
        savings = encoding_tables(codebook, values.device).savings
        worth = savings[places] * (rate_weight / (1 << COST_BITS))
        added = exact.abs_().sub_(nearest.abs_()).mul_(2).add_(1)  # (e + 1)^2 - e^2
        integers -= integers.sign().mul_(added < worth)
    if bool((levels > last).any()):
        kept = codebook.latents_shape[0] - (levels - last).clamp(min=0)
        place = torch.from_numpy(codebook.order.argsort()).to(values.device)
        integers *= place[:, None] < kept
    return integers


def expected_bytes(
    values: Tensor, levels: Tensor, codebook: EntropyCodebook, rate_weight: float
) -> Tensor:
    """int64 (B,): bytes of records at these levels, by the tables; very many where not allowed."""
    integers = integers_at(values, levels, codebook, rate_weight)
    beyond = (integers.abs() > LARGEST).flatten(0, 1).any(0) & (levels < len(codebook.steps) - 1)
    return torch.where(beyond, 1 << 40, bytes_by_tables(integers, codebook))


def bytes_by_tables(integers: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int64 (B,): expected bytes of records of these integers."""
    bits = costs_at(integers, codebook).flatten(0, 1).sum(0, dtype=torch.int64) >> COST_BITS
    return bits // 8 + HEAD_BYTES + int(LANE_BYTES * codebook.lanes)


def encode_integers(
    integers: Tensor, levels: Tensor, codebook: EntropyCodebook
) -> tuple[Tensor, Tensor]:
    """Records uint8 (B, R) of integers (h*w, C, B), and bool (B,) which of them are whole."""
    integers = integers.clamp(-LARGEST, LARGEST)
    order = torch.from_numpy(codebook.order.astype("int64"))
    places = places_at(integers, classes_at(integers, codebook), codebook)
    turns = in_turns(places.index_select(1, order).permute(2, 1, 0), codebook)
    tables, room = encoding_tables(codebook), codebook.record_bytes
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    states, words, counts, quiet = rans.encode(
        tables.frequencies[turns], tables.starts[turns], (room - head) // 2
    )
    patches = integers.permute(2, 1, 0).contiguous()  # (B, C, h*w)
    records = torch.zeros((len(patches), room), dtype=torch.uint8)
    records[:, 0] = levels.clamp(max=len(codebook.steps) - 1).to(torch.uint8)
    records[:, 1] = check_of(patches)
    records[:, 2:HEAD_BYTES] = bytes_of(quiet[:, None].int(), 2)
    records[:, HEAD_BYTES:head] = bytes_of(states, rans.STATE_BYTES)
    stream = bytes_of(words, 2)
    records[:, head : head + stream.shape[1]] = stream
    patches = patches.index_select(1, order)
    escapes = (patches.abs() > torch.from_numpy(codebook.extents)[order, None]).flatten(1)
    fits = head + 2 * counts + escapes.sum(1) <= room
    patch, place = (escapes & fits[:, None]).nonzero(as_tuple=True)
    rank = escapes.cumsum(1)[patch, place]
    records[patch, room - rank] = patches.flatten(1)[patch, place].bitwise_and(0xFF).to(torch.uint8)
    return records, fits


@functools.lru_cache(maxsize=16)
def check_reach(codebook: EntropyCodebook) -> None:
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


def least_bytes(codebook: EntropyCodebook) -> int:
    """Bytes that any patch can be brought down to: those of nothing but zeros."""
    channels, height, width = codebook.latents_shape
    zeros = torch.zeros((height * width, channels, 1), dtype=torch.int32)
    return int(bytes_by_tables(zeros, codebook)) + MARGIN_BYTES


def in_turns(places: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int32 (T, B, L): what is coded in each turn; lanes beyond a phase's cells idle."""
    batch, channels, _ = places.shape
    lanes = codebook.lanes
    idle = encoding_tables(codebook).costs.numel() // codebook.tables.shape[2] - 1
    scan = scan_of(*codebook.latents_shape[1:], places.device)
    parts = []
    for phase in range(PHASES):
        part = places[:, :, scan.phase(phase)]
        beyond = -part.shape[2] % lanes
        parts.append(torch.nn.functional.pad(
            part, (0, beyond), value=idle * codebook.tables.shape[2]
        ).view(batch, channels, -1, lanes))  # fmt: skip
    return torch.cat(parts, 2).flatten(1, 2).transpose(0, 1).contiguous()


def check_of(integers: Tensor) -> Tensor:
    """uint8 (B,): sum of integer * (2 * place + 1), places through (C, h*w) in scan order."""
    flat = integers.flatten(1)
    odd = 2 * torch.arange(flat.shape[1], dtype=torch.int32, device=flat.device) + 1
    return ((flat * odd).sum(1, dtype=torch.int64) & 0xFF).to(torch.uint8)


def bytes_of(numbers: Tensor, width: int) -> Tensor:
    """uint8 (B, n * width): the low bytes of int32 (B, n), lowest first."""
    shifts = 8 * torch.arange(width, dtype=torch.int32)
    return ((numbers[:, :, None] >> shifts) & 0xFF).to(torch.uint8).flatten(1)
