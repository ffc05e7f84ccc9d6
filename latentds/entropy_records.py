"""Records of equal size from latents and back: a step byte, interleaved streams, escape bytes."""
# B patches, C latent channels, h w latent cells, S symbols, L lanes, T turns, R record bytes,
# N = C * h * w values

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from latentds import rans
from latentds.errors import ShapeError

if TYPE_CHECKING:
    from latentds.entropy_codebook import EntropyCodebook

HEAD_BYTES = 2  # the step, and a byte that is 0
LARGEST = 127  # absolute integer, an escape's byte
COST_BITS = 8  # costs are integers of 1/256 bit: their sums do not depend on the order
CHUNK = 64  # patches encoded at a time: some 50 MB
# A stream is longer than its symbols' costs by the words its last states would still have taken;
# that varies by 3 bytes (one sigma) from patch to patch. Two sigma spare most second tries.
MARGIN_BYTES = 6


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedRecords:
    """What records hold.

    integers    int32 (B, C, h, w), within -128..127
    step_index  int64 (B,)
    intact      bool (B,): the streams ended as an encoder's do; a damaged record's rarely does
    """

    integers: Tensor
    step_index: Tensor
    intact: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """A codebook's tables as tensors on one device."""

    decoding: Tensor
    steps: Tensor
    scales: Tensor  # float32 (steps, C): value of an integer's unit


@functools.lru_cache(maxsize=16)
def device_tables(codebook: EntropyCodebook, device: torch.device) -> Tables:
    """Decoding tables, made once for a codebook and a device."""
    rows = codebook.tables.reshape(-1, codebook.tables.shape[2])
    scales = codebook.steps[:, None] / codebook.gains[None, :]
    return Tables(
        decoding=rans.decoding_table(rows).to(device),
        steps=torch.from_numpy(codebook.steps.copy()).to(device),
        scales=torch.from_numpy(scales.astype(np.float32)).to(device),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class EncoderTables:
    """What encoding looks up: intervals and costs of every row's symbols, flat (rows * S)."""

    frequencies: Tensor
    starts: Tensor
    costs: Tensor  # int32, 1/256 bit, an escape's byte included
    symbols: Tensor  # int32: the symbol that codes it, itself or the escape


@functools.lru_cache(maxsize=16)
def encoder_tables(codebook: EntropyCodebook) -> EncoderTables:
    """Encoding tables, made once for a codebook."""
    rows = codebook.tables.reshape(-1, codebook.tables.shape[2]).astype(np.int64)
    symbols = rows.shape[1]
    coder = np.where(rows > 0, np.arange(symbols), symbols - 1)
    frequencies = np.take_along_axis(rows, coder, 1)
    bits = rans.PRECISION_BITS - np.log2(frequencies) + 8 * (coder == symbols - 1)
    plain, starts = rans.encoding_tables(rows)
    flat = torch.from_numpy((coder + symbols * np.arange(len(rows))[:, None]).reshape(-1))
    return EncoderTables(
        frequencies=plain[flat],
        starts=starts[flat],
        costs=torch.from_numpy(np.rint(bits * (1 << COST_BITS)).astype(np.int32).reshape(-1)),
        symbols=torch.from_numpy(coder.astype(np.int32).reshape(-1)),
    )


def least_bytes(codebook: EntropyCodebook) -> int:
    """Bytes that any patch's record may need once all its integers are dropped to zero."""
    rows = codebook.tables[:, :, codebook.magnitude].min(axis=0).astype(np.float64)
    channels, height, width = codebook.latents_shape
    bits = float((rans.PRECISION_BITS - np.log2(rows)).sum()) * height * width
    return HEAD_BYTES + rans.STATE_BYTES * codebook.lanes + 2 * int(bits // 16 + 1)


def check_latents(latents: Tensor, codebook: EntropyCodebook) -> None:
    """Raise unless latents are (B, *latents_shape) and finite."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != codebook.latents_shape:
        raise ShapeError(
            f"latents of shape {tuple(latents.shape)}; the codebook is for (B, "
            f"{', '.join(map(str, codebook.latents_shape))})"
        )
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents contain NaN or infinity; encode in float32")


def encode_records(latents: Tensor, codebook: EntropyCodebook) -> Tensor:
    """See `EntropyCodebook.quantize`."""
    check_latents(latents, codebook)
    values = latents.detach().to("cpu", torch.float32)
    records = torch.empty((len(values), codebook.record_bytes), dtype=torch.uint8)
    for first in range(0, len(values), CHUNK):
        records[first : first + CHUNK] = encode_chunk(values[first : first + CHUNK], codebook)
    return records.to(latents.device)


def encode_chunk(latents: Tensor, codebook: EntropyCodebook) -> Tensor:
    """Records of a few patches: the level by the tables' costs, then tried and made coarser."""
    levels = finest_levels(latents, codebook)
    records = torch.empty((len(latents), codebook.record_bytes), dtype=torch.uint8)
    pending = torch.arange(len(latents))
    while len(pending):
        tried, fits = encode_at(latents[pending], levels[pending], codebook)
        records[pending[fits]] = tried[fits]
        pending = pending[~fits]
        levels[pending] += 1
    return records


def level_count(codebook: EntropyCodebook) -> int:
    """Levels of coarseness: the steps, then the last one with ever more channels dropped."""
    return len(codebook.steps) + codebook.latents_shape[0]


def finest_levels(latents: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int64 (B,): the level whose expected bytes fit, found by halving."""
    low = torch.zeros(len(latents), dtype=torch.int64)
    high = torch.full_like(low, level_count(codebook) - 1)
    while bool((low < high).any()):
        middle = (low + high) // 2
        fits = expected_bytes(latents, middle, codebook) <= codebook.record_bytes - MARGIN_BYTES
        low, high = torch.where(fits, low, middle + 1), torch.where(fits, middle, high)
    return high


def integers_at(latents: Tensor, levels: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int32 (B, C, h*w): rounded to the level's step; the channels it drops are 0."""
    last = len(codebook.steps) - 1
    steps = torch.from_numpy(codebook.steps.copy())[levels.clamp(max=last)]
    rates = torch.from_numpy(codebook.gains.copy())[None, :] / steps[:, None]
    rounded = (latents.flatten(2) * rates[:, :, None]).round_()
    integers = rounded.clamp_(-LARGEST - 1, LARGEST + 1).int()
    kept = codebook.latents_shape[0] - (levels - last).clamp(min=0)
    return integers * (torch.arange(integers.shape[1])[None, :] < kept[:, None])[:, :, None]


def places_of(integers: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int64 (B, C, h*w): place of every value's entry in the encoder's tables."""
    symbols, magnitude = codebook.tables.shape[2], codebook.magnitude
    symbol = torch.where(integers.abs() > magnitude, symbols - 1, integers + magnitude)
    rows = torch.arange(integers.shape[1])[None, :, None]
    return symbol + rows * symbols


def costs_of(integers: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int32 (B, C, h*w): cost of every integer by the tables, in 1/256 bit."""
    return encoder_tables(codebook).costs[places_of(integers, codebook)]


def expected_bytes(latents: Tensor, levels: Tensor, codebook: EntropyCodebook) -> Tensor:
    """int64 (B,): bytes of records at these levels, by the tables; very many where not allowed."""
    integers = integers_at(latents, levels, codebook)
    costs = costs_of(integers, codebook)
    bits = costs.flatten(1).sum(1, dtype=torch.int64) >> COST_BITS
    # The first states cost what they hold beyond what they start from: half a word is the mean.
    overhead = HEAD_BYTES + (rans.STATE_BYTES - 1) * codebook.lanes
    beyond = (integers.abs() > LARGEST).flatten(1).any(1) & (levels < len(codebook.steps) - 1)
    return torch.where(beyond, 1 << 40, bits // 8 + overhead)


def encode_at(latents: Tensor, levels: Tensor, codebook: EntropyCodebook) -> tuple[Tensor, Tensor]:
    """Records uint8 (B, R) at these levels, and bool (B,) which of them are whole."""
    integers = integers_at(latents, levels, codebook).clamp(-LARGEST, LARGEST)
    tables, places = encoder_tables(codebook), places_of(integers, codebook)
    turns = places.view(len(latents), -1, codebook.lanes).transpose(0, 1).contiguous()
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    states, words, counts = rans.encode(
        tables.frequencies[turns], tables.starts[turns], (codebook.record_bytes - head) // 2
    )
    records = torch.zeros((len(latents), codebook.record_bytes), dtype=torch.uint8)
    records[:, 0] = levels.clamp(max=len(codebook.steps) - 1).to(torch.uint8)
    records[:, HEAD_BYTES:head] = bytes_of(states, rans.STATE_BYTES)
    stream = bytes_of(words, 2)
    records[:, head : head + stream.shape[1]] = stream
    escapes = tables.symbols[places].flatten(1) == codebook.tables.shape[2] - 1
    escaped = escapes.sum(1)
    fits = head + 2 * counts + escaped <= codebook.record_bytes
    patch, place = (escapes & fits[:, None]).nonzero(as_tuple=True)
    rank = escapes.cumsum(1)[patch, place]
    values = integers.flatten(1)[patch, place]
    records[patch, codebook.record_bytes - rank] = values.to(torch.int8).view(torch.uint8)
    return records, fits


def bytes_of(numbers: Tensor, width: int) -> Tensor:
    """uint8 (B, n * width): the low bytes of int32 (B, n), lowest first."""
    shifts = 8 * torch.arange(width, dtype=torch.int32)
    return ((numbers[:, :, None] >> shifts) & 0xFF).to(torch.uint8).flatten(1)


def numbers_of(octets: Tensor, width: int) -> Tensor:
    """int32 (B, n) of uint8 (B, n * width), lowest byte first."""
    parts = octets.view(len(octets), -1, width).int()
    shifts = 8 * torch.arange(width, dtype=torch.int32, device=octets.device)
    return (parts << shifts).sum(2, dtype=torch.int32)


def check_records(records: Tensor, codebook: EntropyCodebook) -> None:
    """Raise unless records are uint8 (B, R) whose step bytes name steps there are."""
    if records.dtype != torch.uint8 or records.ndim != 2:
        raise ShapeError(f"records are {records.dtype} {tuple(records.shape)}, not uint8 (B, R)")
    if records.shape[1] != codebook.record_bytes:
        raise ShapeError(
            f"records have {records.shape[1]} bytes, the codebook's have {codebook.record_bytes}"
        )
    count = len(codebook.steps)
    if count < 256 and bool((records[:, 0] >= count).any()):
        place = int((records[:, 0] >= count).nonzero()[0, 0])
        raise ValueError(
            f"record {place} names step {int(records[place, 0])}, the codebook has {count}; it is "
            "damaged or of another codebook"
        )


def decode_records(records: Tensor, codebook: EntropyCodebook) -> DecodedRecords:
    """See `EntropyCodebook.integers`."""
    check_records(records, codebook)
    symbols, lanes = decode_symbols(records, codebook)
    integers = symbols - codebook.magnitude
    escapes = symbols == codebook.tables.shape[2] - 1
    escaped = escapes.sum(1)
    patch, place = escapes.nonzero(as_tuple=True)
    if len(patch):
        rank = escapes.cumsum(1)[patch, place]
        octets = records[patch, (codebook.record_bytes - rank).clamp(min=0)]
        integers[patch, place] = octets.view(torch.int8).int()
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    room = head + 2 * lanes.taken[:, 0] + escaped <= codebook.record_bytes
    return DecodedRecords(
        integers=integers.view(-1, *codebook.latents_shape),
        step_index=records[:, 0].long(),
        intact=(lanes.state == rans.LOW).all(1) & room,
    )


def decode_symbols(records: Tensor, codebook: EntropyCodebook) -> tuple[Tensor, rans.Lanes]:
    """Symbols int32 (B, N), and the lanes as they ended."""
    channels, height, width = codebook.latents_shape
    table = device_tables(codebook, records.device).decoding
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    states = numbers_of(records[:, HEAD_BYTES:head], rans.STATE_BYTES) & (2**31 - 1)
    whole = (codebook.record_bytes - head) // 2 * 2
    lanes = rans.Lanes(states, numbers_of(records[:, head : head + whole], 2))
    turns = height * width // codebook.lanes
    entries = torch.empty(
        (channels * turns, *states.shape), dtype=torch.int32, device=records.device
    )
    for turn in range(channels * turns):
        entries[turn] = lanes.turn(table, turn // turns * rans.TOTAL)
    return rans.symbols_of(entries).transpose(0, 1).flatten(1), lanes


def latents_of(decoded: DecodedRecords, codebook: EntropyCodebook) -> Tensor:
    """float32 (B, C, h, w): every integer times its patch's step over its channel's gain."""
    scales = device_tables(codebook, decoded.integers.device).scales[decoded.step_index]
    return decoded.integers.float() * scales[:, :, None, None]
