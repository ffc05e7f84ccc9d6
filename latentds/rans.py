"""Interleaved range coding (rANS) of small symbols by static tables, vectorized over patches.

Integers only, so that every machine decodes the same. The layout is in docs/format.md.
"""
# B patches, L lanes, T turns (every lane codes one symbol a turn), S symbols, W words, N = T * L
# rows: table rows, one frequency table each

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS  # what the frequencies of a table sum to
LOW_BITS = 15
LOW = 1 << LOW_BITS  # states lie in [2^15, 2^31): they fit int32, which every device multiplies
WORD_BITS = 16
STATE_BYTES = 4
MAX_SYMBOLS = 256  # 8 + 12 + 12 bits of an entry of the decoding table


def decoding_table(frequencies: np.ndarray) -> Tensor:
    """int32 (rows * 4096): symbol << 24 | (frequency - 1) << 12 | place in the symbol's interval.

    frequencies  integers (rows, S), each row summing to 4096
    """
    rows, symbols = frequencies.shape
    counts = frequencies.astype(np.int64)
    starts = np.cumsum(counts, axis=1) - counts
    entries = (np.arange(symbols) << 24) | ((counts - 1) << PRECISION_BITS)
    table = np.repeat(entries.reshape(-1), counts.reshape(-1)).reshape(rows, TOTAL)
    table |= np.arange(TOTAL) - np.repeat(starts.reshape(-1), counts.reshape(-1)).reshape(rows, -1)
    return torch.from_numpy(table.astype(np.uint32).view(np.int32).reshape(-1))


def encoding_tables(frequencies: np.ndarray) -> tuple[Tensor, Tensor]:
    """Frequencies and interval starts, both int32 (rows * S)."""
    counts = frequencies.astype(np.int32)
    starts = np.cumsum(counts, axis=1, dtype=np.int32) - counts
    return torch.from_numpy(counts.reshape(-1)), torch.from_numpy(starts.reshape(-1))


def encode(
    frequencies_TBL: Tensor, starts_TBL: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The streams of B patches.

    frequencies_TBL, starts_TBL  int32 (T, B, L): interval of every symbol, in decoding order;
                                 frequencies are positive
    capacity                     words kept of each stream
    returns                      states int32 (B, L) that decoding starts from; words int32
                                 (B, capacity), zeros behind the stream's end; counts int64 (B,) of
                                 words the stream has, which may be more than `capacity`: then
                                 the words are of no use
    source                       asymmetric numeral systems, Duda 2013; words shared by lanes in
                                 their order, as in Giesen 2014
    """
    turns, batch, lanes = frequencies_TBL.shape
    state = torch.full((batch, lanes), LOW, dtype=torch.int32)
    # Filled from the end, for encoding goes backwards; a column more takes what is not to be kept.
    words = torch.zeros((batch, capacity + 1), dtype=torch.int32)
    first = torch.full((batch, 1), capacity)
    for turn in range(turns - 1, -1, -1):
        frequency = frequencies_TBL[turn]
        full = (state >> (LOW_BITS + WORD_BITS - PRECISION_BITS)) >= frequency
        rank = full.cumsum(1)
        first = first - rank[:, -1:]
        place = torch.where(full, first + rank - 1, capacity)
        words.scatter_(1, place.where(place >= 0, capacity), state & 0xFFFF)
        state = torch.where(full, state >> WORD_BITS, state)
        quotient = torch.div(state, frequency, rounding_mode="floor")
        state = state + quotient * (TOTAL - frequency) + starts_TBL[turn]
    place = first.clamp(min=0) + torch.arange(capacity)
    words[:, capacity] = 0
    return state, words.gather(1, place.clamp(max=capacity)), capacity - first[:, 0]


class Lanes:
    """The decoder's state of B streams between turns.

    state  int32 (B, L)
    words  int32 (B, W), W >= 1
    taken  int64 (B, 1) words that were taken so far; a stream that runs out gives its last word
    """

    def __init__(self, state: Tensor, words: Tensor) -> None:
        self.state = state
        self.words = words
        self.taken = torch.zeros((len(words), 1), dtype=torch.int64, device=words.device)

    def turn(self, table: Tensor, first_entry: Tensor | int) -> Tensor:
        """Entries int32 (B, L) of the decoding table, whose top byte is each lane's next symbol.

        first_entry  where in `table` each lane's row starts: one place, or int32 (B, L)
        """
        state = self.state
        entries = table.index_select(0, ((state & (TOTAL - 1)) + first_entry).view(-1))
        entries = entries.view(state.shape)
        frequency = ((entries >> PRECISION_BITS) & (TOTAL - 1)) + 1
        state = frequency * (state >> PRECISION_BITS) + (entries & (TOTAL - 1))
        empty = state < LOW
        rank = empty.cumsum(1)
        place = (self.taken + (rank - 1)).clamp_(0, self.words.shape[1] - 1)
        refilled = (state << WORD_BITS) | self.words.gather(1, place)
        self.state = torch.where(empty, refilled, state)
        self.taken = self.taken + rank[:, -1:]
        return entries


def symbols_of(entries: Tensor) -> Tensor:
    """Symbols, in the entries' shape, int32 in 0..255."""
    return (entries >> 24) & 0xFF
