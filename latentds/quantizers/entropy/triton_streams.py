"""Records into integers on a GPU: one Triton kernel, a program a record.

A loop in torch would launch ten kernels a turn, for thousands of turns. Imported only where records
lie on a GPU.
"""
# B patches, C latent channels, N h*w cells in scan order, R record bytes, L lanes, K classes,
# P parents of a channel

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from latentds.quantizers.entropy import rans
from latentds.quantizers.entropy.native_model import native_model
from latentds.quantizers.entropy.record_model import RecordModel

BLUR_CELLS = 128  # at once

HEAD = tl.constexpr(rans.HEAD_BYTES)
STATE = tl.constexpr(rans.STATE_BYTES)
BITS = tl.constexpr(rans.PRECISION_BITS)
TOTAL = tl.constexpr(rans.TOTAL)
LOW = tl.constexpr(rans.LOW)
WORD_BITS = tl.constexpr(rans.WORD_BITS)


@triton.jit
def smooth(seen, blurred, inverse, N, W, BLUR: tl.constexpr):
    """`contexts.blur` of one channel; at most 16 times `contexts.CAP`, so a byte holds it."""
    for start in range(0, N, BLUR):
        cell = start + tl.arange(0, BLUR)
        is_cell = cell < N
        y, x = cell // W, cell % W
        sums = tl.zeros([BLUR], tl.int32)
        for dy in tl.static_range(-1, 2):
            for dx in tl.static_range(-1, 2):
                row = tl.minimum(tl.maximum(y + dy, 0), N // W - 1)
                column = tl.minimum(tl.maximum(x + dx, 0), W - 1)
                place = tl.load(inverse + row * W + column, mask=is_cell, other=0)
                near = tl.load(seen + place, mask=is_cell, other=0).to(tl.int32)
                sums += (2 - dy * dy) * (2 - dx * dx) * near
        place = tl.load(inverse + cell, mask=is_cell, other=0)
        tl.store(blurred + place, sums.to(tl.uint8), mask=is_cell)


@triton.jit
def read_kernel(
    records, integers, intact, seen, blurred,
    order, parents, weights, thresholds, caps, is_parent, decoding,
    cells, inverse, neighbours, ends,
    R, C, N, W, turns, magnitude, escape,
    L: tl.constexpr, K: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, BLUR: tl.constexpr,
):  # fmt: skip
    """One record: `native_streams.read_all`, step by step.

    integers  int32 (B, C, N), cells row by row
    intact    bool (B,)
    seen, blurred  uint8 (B, C, N) in scan order, to work in: magnitudes, and those smoothed
    WIDTH     the power of two that holds L
    """
    patch = tl.program_id(0).to(tl.int64)
    record, planes = records + patch * R, patch * C * N
    lane = tl.arange(0, WIDTH)
    is_lane = lane < L
    state = tl.zeros([WIDTH], tl.int32)
    for number in tl.static_range(STATE):
        octets = record + HEAD + STATE * lane + number
        state |= tl.load(octets, mask=is_lane, other=0).to(tl.int32) << 8 * number
    state &= 0x7FFFFFFF
    quiet = tl.load(record + 2).to(tl.int32) | (tl.load(record + 3).to(tl.int32) << 8)
    awake, taken, escaped, total = turns - quiet, 0, 0, 0
    stream = record + HEAD + STATE * L
    final = (R - HEAD - STATE * L) // 2 - 1
    for place in range(C):
        channel = tl.load(order + place)
        cap = tl.load(caps + channel)
        plane = planes + channel * N
        first = 0
        for phase in tl.static_range(3):
            end = tl.load(ends + phase)
            weight = weights + (channel * 3 + phase) * (P + 2)
            for start in range(first, end, L):
                cell = start + lane
                is_cell = is_lane & (cell < end)
                expected = tl.zeros([WIDTH], tl.int32) + tl.load(weight)
                if phase > 0:
                    near = tl.zeros([WIDTH], tl.int32)
                    for side in tl.static_range(4):
                        beside = tl.load(neighbours + side * N + cell, mask=is_cell, other=0)
                        near += tl.load(seen + plane + beside, mask=is_cell, other=0).to(tl.int32)
                    expected += 4 * tl.load(weight + 1) * near
                for number in tl.static_range(P):
                    parent = blurred + planes + tl.load(parents + channel * P + number) * N
                    above = tl.load(parent + cell, mask=is_cell, other=0).to(tl.int32)
                    expected += tl.load(weight + 2 + number) * above
                row = tl.zeros([WIDTH], tl.int32)
                for number in tl.static_range(K - 1):
                    limit = tl.load(thresholds + channel * (K - 1) + number)
                    row += (expected >= limit).to(tl.int32)
                row = (channel * K + row) * TOTAL
                entry = tl.load(decoding + row + (state & (TOTAL - 1)), mask=is_cell, other=0)
                interval = ((entry >> BITS) & (TOTAL - 1)) + 1
                decoded = interval * (state >> BITS) + (entry & (TOTAL - 1))
                state = tl.where(is_cell, decoded, state)
                # Lanes take words in their order; a stream that runs out gives its last word.
                is_empty = is_lane & (state < LOW) & (awake > 0)
                rank = tl.cumsum(is_empty.to(tl.int32), 0)
                words = stream + 2 * tl.minimum(taken + tl.maximum(rank - 1, 0), final)
                word = tl.load(words, mask=is_empty, other=0).to(tl.int32)
                word |= tl.load(words + 1, mask=is_empty, other=0).to(tl.int32) << 8
                state = tl.where(is_empty, (state << WORD_BITS) | word, state)
                taken += tl.sum(is_empty.to(tl.int32), 0)
                awake -= 1
                symbol = (entry >> 24) & 0xFF
                is_escape = is_cell & (symbol == escape)
                value = symbol - magnitude
                shown = tl.minimum(tl.abs(value), cap)
                tl.store(seen + plane + cell, shown.to(tl.uint8), mask=is_cell)
                rank = tl.cumsum(is_escape.to(tl.int32), 0)
                tail = record + tl.maximum(R - escaped - rank, 0)
                extra = tl.load(tail, mask=is_escape, other=0).to(tl.int8, bitcast=True)
                value = tl.where(is_escape, extra.to(tl.int32), value)
                escaped += tl.sum(is_escape.to(tl.int32), 0)
                factor = 2 * (channel * N + cell) + 1
                total += tl.sum(tl.where(is_cell, value * factor, 0), 0)
                raster = tl.load(cells + cell, mask=is_cell, other=0)
                tl.store(integers + plane + raster, value, mask=is_cell)
            tl.debug_barrier()  # neighbours are read by other threads than wrote them
            first = end
        if tl.load(is_parent + channel) != 0:
            smooth(seen + plane, blurred + plane, inverse, N, W, BLUR)
            tl.debug_barrier()
    is_whole = HEAD + STATE * L + 2 * taken + escaped <= R
    check = tl.load(record + 1).to(tl.int32)
    tl.store(intact + patch, is_whole & ((total & 0xFF) == check))


@functools.lru_cache(maxsize=16)
def model_on(codebook: RecordModel, device: torch.device) -> tuple[Tensor, ...]:
    """The codebook's arrays as the kernel takes them, int32."""
    model = native_model(codebook)
    arrays = (
        *(model.order, model.parents.clip(0), model.weights, model.thresholds, model.caps),
        *(model.is_parent, model.decoding),
        *(model.cells, np.argsort(model.cells), model.neighbours, model.ends),
    )
    return tuple(
        torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device) for array in arrays
    )


def read_records(records: Tensor, codebook: RecordModel) -> tuple[Tensor, Tensor]:
    """Integers int32 (B, C, h*w) and which records are intact (B,), of records uint8 (B, R).

    Nothing waits for the device.
    """
    channels, height, width = codebook.latents_shape
    shape, device = (len(records), channels, height * width), records.device
    integers = torch.empty(shape, dtype=torch.int32, device=device)
    intact = torch.empty(len(records), dtype=torch.bool, device=device)
    seen, blurred = torch.empty((2, *shape), dtype=torch.uint8, device=device)
    if not len(records):
        return integers, intact
    with torch.cuda.device(records.get_device()):  # Triton launches on the current one
        read_kernel[(len(records),)](
            records.contiguous(), integers, intact, seen, blurred, *model_on(codebook, device),
            *(codebook.record_bytes, channels, height * width, width),
            *(channels * sum(codebook.turns), codebook.magnitude, codebook.tables.shape[2] - 1),
            L=codebook.lanes, K=len(codebook.tables), P=codebook.parents.shape[1],
            WIDTH=triton.next_power_of_2(codebook.lanes), BLUR=BLUR_CELLS,
            num_warps=1, num_stages=1,
        )  # fmt: skip
    return integers, intact
