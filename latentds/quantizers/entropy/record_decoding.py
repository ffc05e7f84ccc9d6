"""Records into integers and latents: the same integers from compiled code on the CPU as from a loop
in torch on other devices."""
# B patches, C latent channels, h w latent cells, L lanes, T turns, R record bytes

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from latentds.errors import ShapeError
from latentds.quantizers.entropy import rans
from latentds.quantizers.entropy.coder_tables import decoding_table, model_tables
from latentds.quantizers.entropy.contexts import around_of, blur
from latentds.quantizers.entropy.native_model import decoded_values, native_model
from latentds.quantizers.entropy.rans import HEAD_BYTES
from latentds.quantizers.entropy.record_encoding import by_patch, check_of
from latentds.quantizers.entropy.record_model import RecordModel


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedRecords:
    """What records hold.

    integers    int32 (B, C, h, w), within -128..127
    step_index  int64 (B,)
    intact      bool (B,): the record's check holds and its stream fits; of damaged ones one in 256
                and fewer pass
    """

    integers: Tensor
    step_index: Tensor
    intact: Tensor


def check_records(records: Tensor, codebook: RecordModel) -> None:
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


def decode_records(records: Tensor, codebook: RecordModel) -> DecodedRecords:
    """See `EntropyCodebook.integers`."""
    check_records(records, codebook)
    decode = decode_natively if records.device.type == "cpu" else decode_in_torch
    integers, intact = decode(records, codebook)
    return DecodedRecords(
        integers=integers.view(-1, *codebook.latents_shape),
        step_index=records[:, 0].long(),
        intact=intact,
    )


def decode_natively(records: Tensor, codebook: RecordModel) -> tuple[Tensor, Tensor]:
    """Integers int32 (B, C, h*w) and which records are intact, of records on the CPU."""
    from latentds.quantizers.entropy import native_streams as streams

    channels, height, width = codebook.latents_shape
    octets = np.ascontiguousarray(records.numpy())
    integers = np.empty((len(octets), channels, height * width), np.int32)
    intact = np.empty(len(octets), np.bool_)
    by_patch(
        lambda part: streams.read_all(
            octets[part], native_model(codebook), integers[part], intact[part]
        ),
        len(octets),
    )
    return torch.from_numpy(integers), torch.from_numpy(intact)


def decode_in_torch(records: Tensor, codebook: RecordModel) -> tuple[Tensor, Tensor]:
    """As `decode_natively`, on any device."""
    lanes = open_lanes(records, codebook)
    symbols = decode_symbols(lanes, codebook)
    integers, fits = with_escapes(symbols, records, lanes, codebook)
    scan = model_tables(codebook, records.device).scan
    order = torch.from_numpy(codebook.order.argsort()).to(records.device)
    integers = integers.index_select(1, order)
    intact = fits & (check_of(integers) == records[:, 1])
    return integers.index_select(2, scan.inverse), intact


def turns_of(codebook: RecordModel) -> list[int]:
    """Turns of a channel's phases."""
    _, height, width = codebook.latents_shape
    even = ((height + 1) // 2) * ((width + 1) // 2)
    odd = (height // 2) * (width // 2)
    return [-(-n // codebook.lanes) for n in (even, odd, height * width - even - odd)]


def open_lanes(records: Tensor, codebook: RecordModel) -> rans.Lanes:
    """The lanes before the first turn."""
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    states = numbers_of(records[:, HEAD_BYTES:head], rans.STATE_BYTES) & (rans.HIGH - 1)
    whole = (codebook.record_bytes - head) // 2 * 2
    quiet = numbers_of(records[:, 2:HEAD_BYTES], 2)[:, 0]
    turns = codebook.latents_shape[0] * sum(turns_of(codebook))
    lowest = rans.lowest_states(turns, quiet)
    return rans.Lanes(states, numbers_of(records[:, head : head + whole], 2), lowest)


def decode_symbols(lanes: rans.Lanes, codebook: RecordModel) -> Tensor:
    """Symbols int32 (B, C, h*w), channels in the order of coding, cells in scan order."""
    channels, height, width = codebook.latents_shape
    device = lanes.words.device
    model, table = model_tables(codebook, device), decoding_table(codebook, device)
    batch = len(lanes.words)
    symbols = torch.empty((batch, channels, height * width), dtype=torch.int32, device=device)
    blurred = torch.zeros((channels, batch, 1, height * width), dtype=torch.int32, device=device)
    wanted = set(codebook.parents.reshape(-1).tolist())
    for place, channel in enumerate(codebook.order.tolist()):
        part = slice(channel, channel + 1)
        magnitudes = torch.zeros((batch, 1, height * width), dtype=torch.int32, device=device)
        for phase, turns in enumerate(turns_of(codebook)):
            cells = model.scan.phase(phase)
            rows = channel
            if len(codebook.tables) > 1:
                around = around_of(magnitudes, model.scan, phase)
                above = [
                    blurred[max(p, 0)][:, :, cells] for p in codebook.parents[channel].tolist()
                ]
                rows = model.classes(phase, around, above, part)[:, 0] * channels + channel
            found = decode_phase(lanes, table, rows, turns, cells.stop - cells.start)
            symbols[:, place, cells] = found
            magnitudes[:, 0, cells] = model.magnitudes(found - codebook.magnitude, part)
        if channel in wanted:
            blurred[channel] = blur(magnitudes, model.scan, height, width)
    return symbols


def decode_phase(
    lanes: rans.Lanes, table: Tensor, rows: Tensor | int, turns: int, cells: int
) -> Tensor:
    """Symbols int32 (B, cells): `rows` says which table codes each, int32 (B, cells) or one."""
    batch, count = lanes.state.shape
    idle = table.numel() - rans.TOTAL
    first = torch.full((batch, turns * count), idle, dtype=torch.int32, device=table.device)
    first[:, :cells] = rows * rans.TOTAL
    entries = torch.empty_like(first)
    for turn in range(turns):
        part = slice(turn * count, (turn + 1) * count)
        entries[:, part] = lanes.turn(table, first[:, part])
    return rans.symbols_of(entries[:, :cells])


def with_escapes(
    symbols: Tensor, records: Tensor, lanes: rans.Lanes, codebook: RecordModel
) -> tuple[Tensor, Tensor]:
    """Integers int32 (B, C, h*w) of symbols, and bool (B,): streams and escapes fit the record."""
    room = codebook.record_bytes
    escapes = (symbols == codebook.tables.shape[2] - 1).flatten(1)
    integers = symbols - codebook.magnitude
    flat = integers.view(len(symbols), -1)
    patch, place = escapes.nonzero(as_tuple=True)
    if len(patch):
        rank = escapes.cumsum(1)[patch, place]
        octets = records[patch, (room - rank).clamp(min=0)]
        flat[patch, place] = octets.view(torch.int8).int()
    head = HEAD_BYTES + rans.STATE_BYTES * codebook.lanes
    return integers, head + 2 * lanes.taken[:, 0] + escapes.sum(1) <= room


def numbers_of(octets: Tensor, width: int) -> Tensor:
    """int32 (B, n) of uint8 (B, n * width), lowest byte first."""
    parts = octets.reshape(len(octets), octets.shape[1] // width, width).int()
    shifts = 8 * torch.arange(width, dtype=torch.int32, device=octets.device)
    return (parts << shifts).sum(2, dtype=torch.int32)


def latents_of(decoded: DecodedRecords, codebook: RecordModel) -> Tensor:
    """float32 (B, C, h, w): every integer times its patch's step over its channel's gain."""
    scales = torch.from_numpy(decoded_values(codebook)).to(decoded.integers.device)
    return decoded.integers.float() * scales[decoded.step_index][:, :, None, None]
