"""Integers into records and back on the CPU, a patch at a time, in machine code by Numba.

Some twenty instructions a value; on a GPU the kernel of `triton_streams` decodes the same integers.
"""
# B patches, C latent channels, N h*w cells in scan order, n cells of a phase, K classes,
# R record bytes, L lanes, T turns

from __future__ import annotations

import numpy as np

from latentds.quantizers.entropy.native_model import Model
from latentds.quantizers.entropy.native_rounding import blur, compiled, inner, name_classes
from latentds.quantizers.entropy.rans import (
    HEAD_BYTES,
    HIGH,
    LOW,
    LOW_BITS,
    MAX_QUIET,
    PRECISION_BITS,
    STATE_BYTES,
    TOTAL,
    WORD_BITS,
)

FULL_SHIFT = LOW_BITS + WORD_BITS - PRECISION_BITS


@inner
def turns_of(model: Model) -> int:
    """T, of all channels."""
    turns, first = 0, 0
    for phase in range(3):
        turns += (model.ends[phase] - first + model.lanes - 1) // model.lanes
        first = model.ends[phase]
    return turns * len(model.order)


@inner
def intervals_of(
    integers: np.ndarray,
    classes: np.ndarray,
    model: Model,
    frequencies: np.ndarray,
    starts: np.ndarray,
) -> None:
    """Fill (T, L) in the order of coding; lanes beyond a phase's cells take no bits."""
    frequencies[:] = TOTAL
    starts[:] = 0
    turn, lanes, escape = 0, model.lanes, model.costs.shape[2] - 1
    for channel in model.order:
        extent, first = model.extents[channel], 0
        for phase in range(3):
            cells = model.ends[phase] - first
            for cell in range(cells):
                integer, table = integers[channel, first + cell], classes[channel, first + cell]
                symbol = escape if abs(integer) > extent else integer + model.magnitude
                row, lane = turn + cell // lanes, cell % lanes
                frequencies[row, lane] = model.frequencies[table, channel, symbol]
                starts[row, lane] = model.starts[table, channel, symbol]
            turn += (cells + lanes - 1) // lanes
            first = model.ends[phase]


@inner
def push(state: int, frequency: int, start: int) -> int:
    """The state that decodes to this symbol and leaves `state`."""
    return state + state // frequency * (TOTAL - frequency) + start


@inner
def quiet_turns(frequencies: np.ndarray, starts: np.ndarray) -> int:
    """How many last turns (T, L) can be coded from states of zero and take no words."""
    turns, lanes = len(frequencies), frequencies.shape[1]
    states = np.zeros(lanes, np.int64)
    for quiet in range(min(turns, MAX_QUIET)):
        turn = turns - 1 - quiet
        for lane in range(lanes):
            states[lane] = push(states[lane], frequencies[turn, lane], starts[turn, lane])
            if states[lane] >= HIGH:
                return quiet
    return min(turns, MAX_QUIET)


@inner
def begin(frequencies: np.ndarray, starts: np.ndarray, states: np.ndarray) -> int:
    """Fill the states (L,) to begin with; returns how many last turns take no words.

    A lane that began at 2^15 would spend 15 bits on saying nothing. Here it begins at the least
    state that is 2^15 or more once the quiet turns are coded, most often 0: 1.8 bytes a lane saved.
    """
    turns, lanes = frequencies.shape
    quiet = quiet_turns(frequencies, starts)
    states[:] = LOW
    for turn in range(turns - quiet, turns):
        for lane in range(lanes):
            frequency = frequencies[turn, lane]
            inside = min(max((states[lane] & (TOTAL - 1)) - starts[turn, lane], 0), frequency)
            states[lane] = (states[lane] >> PRECISION_BITS) * frequency + inside
    for lane in range(lanes):
        state = states[lane]
        for turn in range(turns - 1, turns - 1 - quiet, -1):
            state = min(push(state, frequencies[turn, lane], starts[turn, lane]), HIGH)
        if not LOW <= state < HIGH:
            states[:] = LOW
            return 0
    return quiet


@inner
def write_stream(
    frequencies: np.ndarray, starts: np.ndarray, words: np.ndarray, states: np.ndarray
) -> tuple[int, int]:
    """Code backwards; returns how many words there are and how many last turns take none.

    words   (W,), the stream is at its end; of no use if there are more than W words
    states  (L,), filled with those that decoding starts from
    source  asymmetric numeral systems, Duda 2013; words shared by lanes in their order, as in
            Giesen 2014
    """
    turns, lanes = frequencies.shape
    quiet = begin(frequencies, starts, states)
    count = 0
    for turn in range(turns - 1, -1, -1):
        for lane in range(lanes - 1, -1, -1):
            frequency, state = frequencies[turn, lane], states[lane]
            if turn < turns - quiet and state >> FULL_SHIFT >= frequency:
                count += 1
                if count <= len(words):
                    words[len(words) - count] = state & 0xFFFF
                state >>= WORD_BITS
            states[lane] = push(state, frequency, starts[turn, lane])
    return count, quiet


@inner
def check_of(integers: np.ndarray) -> int:
    """Low byte of the sum of integer * (2 * place + 1), places through (C, N)."""
    total = 0
    for channel in range(integers.shape[0]):
        for place in range(integers.shape[1]):
            total += integers[channel, place] * (2 * (channel * integers.shape[1] + place) + 1)
    return total & 0xFF


@inner
def write_escapes(integers: np.ndarray, model: Model, record: np.ndarray, first: int) -> bool:
    """Fill a record's end with integers that no table has; returns whether they end at `first`."""
    end = len(record)
    for channel in model.order:
        for integer in integers[channel]:
            if abs(integer) > model.extents[channel]:
                end -= 1
                if end < first:
                    return False
                record[end] = integer & 0xFF
    return True


@compiled
def write_all(
    integers: np.ndarray,
    classes: np.ndarray,
    levels: np.ndarray,
    model: Model,
    records: np.ndarray,
    fits: np.ndarray,
) -> None:
    """Fill records uint8 (B, R) and fits (B,) of integers int32 (B, C, N) within -127..127."""
    shape, last = (turns_of(model), model.lanes), len(model.steps) - 1
    frequencies, starts = np.empty(shape, np.int64), np.empty(shape, np.int64)
    head = HEAD_BYTES + STATE_BYTES * model.lanes
    words = np.empty((records.shape[1] - head) // 2, np.int64)
    states = np.empty(model.lanes, np.int64)
    for patch in range(len(integers)):
        intervals_of(integers[patch], classes[patch], model, frequencies, starts)
        count, quiet = write_stream(frequencies, starts, words, states)
        record = records[patch]
        record[:] = 0
        record[0] = min(levels[patch], last)
        record[1] = check_of(integers[patch])
        record[2], record[3] = quiet & 0xFF, quiet >> 8
        for lane in range(model.lanes):
            for octet in range(STATE_BYTES):
                record[HEAD_BYTES + STATE_BYTES * lane + octet] = states[lane] >> 8 * octet & 0xFF
        kept = min(count, len(words))
        for place in range(kept):
            word = words[len(words) - kept + place]
            record[head + 2 * place], record[head + 2 * place + 1] = word & 0xFF, word >> 8
        whole = write_escapes(integers[patch], model, record, head + 2 * kept)
        fits[patch] = whole and count <= len(words)


@inner
def read_states(record: np.ndarray, lanes: int) -> np.ndarray:
    """int64 (L,): the states that decoding starts from."""
    states = np.zeros(lanes, np.int64)
    for lane in range(lanes):
        for octet in range(STATE_BYTES):
            value = np.int64(record[HEAD_BYTES + STATE_BYTES * lane + octet])
            states[lane] |= value << 8 * octet
        states[lane] &= HIGH - 1
    return states


@inner
def read_phase(
    record: np.ndarray,
    head: int,
    taken: int,
    awake: int,
    states: np.ndarray,
    decoding: np.ndarray,
    classes: np.ndarray,
    symbols: np.ndarray,
) -> int:
    """Fill symbols (n,) of a phase of a channel; returns how many words were taken so far.

    awake     turns from here on in which lanes take words
    decoding  (K, 4096) of the channel
    classes   (n,)

    A stream that runs out gives its last word.
    """
    lanes, final = len(states), (len(record) - head) // 2 - 1
    for start in range(0, len(symbols), lanes):
        for lane in range(lanes):
            state, place = states[lane], start + lane
            if place < len(symbols):
                entry = np.int64(decoding[classes[place], state & (TOTAL - 1)])
                frequency = (entry >> PRECISION_BITS & (TOTAL - 1)) + 1
                state = frequency * (state >> PRECISION_BITS) + (entry & (TOTAL - 1))
                symbols[place] = entry >> 24 & 0xFF
            if state < LOW and awake > 0:
                word = head + 2 * min(taken, final)
                state = state << 16 | np.int64(record[word + 1]) << 8 | np.int64(record[word])
                taken += 1
            states[lane] = state
        awake -= 1
    return taken


@inner
def read_symbols(record: np.ndarray, model: Model, symbols: np.ndarray) -> int:
    """Fill symbols int32 (C, N) of a record; returns how many words were taken."""
    lanes, head = model.lanes, HEAD_BYTES + STATE_BYTES * model.lanes
    states, (channels, count) = read_states(record, lanes), symbols.shape
    awake = turns_of(model) - (np.int64(record[2]) | np.int64(record[3]) << 8)
    magnitudes, raster, lines = np.empty((3, count), np.int32)
    blurred, expected = np.zeros((channels, count), np.int32), np.empty(count, np.int32)
    classes, taken = np.empty(count, np.int32), 0
    for channel in model.order:
        cap, first = model.caps[channel], 0
        for phase in range(3):
            end = model.ends[phase]
            name_classes(
                model.weights[channel, phase], model.thresholds[channel], model.parents[channel],
                model.neighbours[:, first if phase else end : end], magnitudes,
                blurred[:, first:end], classes[first:end], expected[first:end],
            )  # fmt: skip
            taken = read_phase(
                record, head, taken, awake, states, model.decoding[channel], classes[first:end],
                symbols[channel, first:end],
            )  # fmt: skip
            awake -= (end - first + lanes - 1) // lanes
            for place in range(first, end):
                magnitudes[place] = min(abs(symbols[channel, place] - model.magnitude), cap)
            first = end
        if model.is_parent[channel]:
            blur(magnitudes, model.cells, model.width, raster, lines, blurred[channel])
    return taken


@compiled
def read_all(records: np.ndarray, model: Model, integers: np.ndarray, intact: np.ndarray) -> None:
    """Fill integers int32 (B, C, N), cells row by row, and intact (B,), of records uint8 (B, R)."""
    escape = model.costs.shape[2] - 1
    _, channels, cells = integers.shape
    found = np.empty((channels, cells), np.int32)
    for patch in range(len(records)):
        record, end = records[patch], records.shape[1]
        taken = read_symbols(record, model, found)
        for channel in model.order:
            for place in range(cells):
                if found[channel, place] == escape:
                    end -= 1
                    found[channel, place] = np.int8(record[max(end, 0)])
                else:
                    found[channel, place] -= model.magnitude
        fits = HEAD_BYTES + STATE_BYTES * model.lanes + 2 * taken <= end
        intact[patch] = fits and check_of(found) == record[1]
        for channel in range(channels):
            for place in range(cells):
                integers[patch, channel, model.cells[place]] = found[channel, place]
