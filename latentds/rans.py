"""Interleaved range coding (rANS) of small symbols by static tables, vectorized over patches.

Integers only, so that every machine decodes the same. The layout is in docs/format.md.
"""
# B patches, L lanes, T turns (every lane codes one symbol a turn), S symbols, W words
# rows: table rows, one frequency table each

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS  # what the frequencies of a table sum to
LOW_BITS = 15
LOW = 1 << LOW_BITS  # states lie in [2^15, 2^31): they fit int32, which every device multiplies
HIGH = 1 << 31
WORD_BITS = 16
STATE_BYTES = 4
MAX_SYMBOLS = 256  # 8 + 12 + 12 bits of an entry of the decoding table
MAX_QUIET = (1 << 16) - 1  # turns, two bytes of a record


def decoding_table(frequencies: np.ndarray) -> Tensor:
    """int32 (rows * 4096): symbol << 24 | (frequency - 1) << 12 | place in the symbol's interval.

    frequencies  integers (rows, S), each row summing to 4096
    """
    rows, symbols = frequencies.shape
    counts = frequencies.astype(np.int64)
    starts = (np.cumsum(counts, axis=1) - counts).reshape(-1)
    entries = (np.arange(symbols) << 24) | ((counts - 1) << PRECISION_BITS)
    table = np.repeat(entries.reshape(-1), counts.reshape(-1))
    table |= np.tile(np.arange(TOTAL), rows) - np.repeat(starts, counts.reshape(-1))
    return torch.from_numpy(table.astype(np.uint32).view(np.int32))


def encode(
    frequencies_TBL: Tensor, starts_TBL: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams of B patches.

    frequencies_TBL, starts_TBL  int32 (T, B, L): interval of every symbol, in decoding order;
                                 frequencies are positive
    capacity                     words kept of each stream
    returns                      states int32 (B, L) that decoding starts from; words int32
                                 (B, capacity), zeros behind the stream's end; counts int64 (B,) of
                                 words the stream has, which may be more than `capacity`: then
                                 the words are of no use; quiet int64 (B,), the last turns in which
                                 no lane takes a word
    source                       asymmetric numeral systems, Duda 2013; words shared by lanes in
                                 their order, as in Giesen 2014
    """
    turns, batch, _ = frequencies_TBL.shape
    quiet, state = quiet_start(frequencies_TBL, starts_TBL)
    lowest = lowest_states(turns, quiet)
    # Filled from the end, for encoding goes backwards; a column more takes what is not to be kept.
    words = torch.zeros((batch, capacity + 1), dtype=torch.int32)
    first = torch.full((batch, 1), capacity)
    for turn in range(turns - 1, -1, -1):
        frequency = frequencies_TBL[turn]
        full = (state >> (LOW_BITS + WORD_BITS - PRECISION_BITS)) >= frequency
        full &= lowest[turn] > 0
        rank = full.cumsum(1)
        first = first - rank[:, -1:]
        place = torch.where(full, first + rank - 1, capacity)
        words.scatter_(1, place.where(place >= 0, capacity), state & 0xFFFF)
        state = push(torch.where(full, state >> WORD_BITS, state), frequency, starts_TBL[turn])
    place = first.clamp(min=0) + torch.arange(capacity)
    words[:, capacity] = 0
    return state, words.gather(1, place.clamp(max=capacity)), capacity - first[:, 0], quiet


def push(state: Tensor, frequency: Tensor, start: Tensor) -> Tensor:
    """The state that decodes to this symbol and leaves `state`."""
    quotient = torch.div(state, frequency, rounding_mode="floor")
    return state + quotient * (TOTAL - frequency) + start


def quiet_start(frequencies_TBL: Tensor, starts_TBL: Tensor) -> tuple[Tensor, Tensor]:
    """How many last turns take no words, int64 (B,), and the states int32 (B, L) to begin with.

    A lane that began at 2^15 would spend 15 bits on saying nothing. Here it begins at the least
    state that is 2^15 or more once the quiet turns are coded, most often 0: 1.8 bytes a lane saved.
    """
    turns, batch, lanes = frequencies_TBL.shape
    state = torch.zeros((batch, lanes), dtype=torch.int64)
    quiet = torch.zeros(batch, dtype=torch.int64)
    active = torch.ones(batch, dtype=torch.bool)
    most = min(turns, MAX_QUIET)
    for turn in range(turns - 1, turns - 1 - most, -1):
        state = push(state, frequencies_TBL[turn], starts_TBL[turn])
        active &= (state < HIGH).all(1)
        quiet += active
        if not bool(active.any()):
            break
        state.clamp_(max=HIGH)  # those that are through must not grow beyond int64
    begin = least_states(frequencies_TBL, starts_TBL, quiet)
    sound = ends_in_range(frequencies_TBL, starts_TBL, quiet, begin)
    begin = torch.where(sound[:, None], begin, LOW)
    return torch.where(sound, quiet, 0), begin.int()


def least_states(frequencies_TBL: Tensor, starts_TBL: Tensor, quiet: Tensor) -> Tensor:
    """int64 (B, L): least states that the quiet turns' symbols make 2^15 or more."""
    turns, batch, lanes = frequencies_TBL.shape
    least = torch.full((batch, lanes), LOW, dtype=torch.int64)
    for turn in range(turns - int(quiet.max()), turns):
        frequency, start = frequencies_TBL[turn], starts_TBL[turn]
        inside = ((least & (TOTAL - 1)) - start).clamp(min=0).minimum(frequency)
        before = (least >> PRECISION_BITS) * frequency + inside
        least = torch.where((turns - turn <= quiet)[:, None], before, least)
    return least


def ends_in_range(
    frequencies_TBL: Tensor, starts_TBL: Tensor, quiet: Tensor, begin: Tensor
) -> Tensor:
    """bool (B,): whether all states are below 2^31 after the quiet turns."""
    turns, state = len(frequencies_TBL), begin
    for turn in range(turns - 1, turns - 1 - int(quiet.max()), -1):
        pushed = push(state, frequencies_TBL[turn], starts_TBL[turn])
        state = torch.where((turns - turn <= quiet)[:, None], pushed, state).clamp(max=HIGH)
    return ((state >= LOW) & (state < HIGH)).all(1)


def lowest_states(turns: int, quiet: Tensor) -> Tensor:
    """int32 (T, B, 1): below which a lane takes a word, 2^15 and 0 in the quiet turns."""
    awake = turns - quiet[None, :, None]
    turn = torch.arange(turns, device=quiet.device)[:, None, None]
    return torch.where(turn < awake, LOW, 0).int()


class Lanes:
    """The decoder's state of B streams between turns.

    state   int32 (B, L)
    words   int32 (B, W), W >= 1
    lowest  int32 (T, B, 1) of `lowest_states`
    taken   int64 (B, 1) words that were taken so far; a stream that runs out gives its last word
    """

    def __init__(self, state: Tensor, words: Tensor, lowest: Tensor) -> None:
        self.state = state
        self.words = words
        self.lowest = lowest
        self.turns = 0
        self.taken = torch.zeros((len(words), 1), dtype=torch.int64, device=words.device)

    def turn(self, table: Tensor, first_entry: Tensor) -> Tensor:
        """Entries int32 (B, L) of the decoding table, whose top byte is each lane's next symbol.

        first_entry  int32 (B, L), where in `table` each lane's row starts
        """
        state = self.state
        entries = table.index_select(0, ((state & (TOTAL - 1)) + first_entry).view(-1))
        entries = entries.view(state.shape)
        frequency = ((entries >> PRECISION_BITS) & (TOTAL - 1)) + 1
        state = frequency * (state >> PRECISION_BITS) + (entries & (TOTAL - 1))
        empty = state < self.lowest[self.turns]
        rank = empty.cumsum(1)
        place = (self.taken + (rank - 1)).clamp_(0, self.words.shape[1] - 1)
        refilled = (state << WORD_BITS) | self.words.gather(1, place)
        self.state = torch.where(empty, refilled, state)
        self.taken = self.taken + rank[:, -1:]
        self.turns += 1
        return entries


def symbols_of(entries: Tensor) -> Tensor:
    """Symbols, in the entries' shape, int32 in 0..255."""
    return (entries >> 24) & 0xFF
