"""Interleaved range coding (rANS) of small symbols by static tables: its numbers, and the decoder
vectorized over patches.

Integers only, so that every machine decodes the same. The layout is in docs/format.md.
"""
# B patches, L lanes, T turns (every lane codes one symbol a turn), S symbols, W words
# rows: table rows, one frequency table each

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PRECISION_BITS = 12
TOTAL = 1 << PRECISION_BITS  # what the frequencies of a table sum to
LOW_BITS = 15
LOW = 1 << LOW_BITS  # states lie in [2^15, 2^31): they fit int32, which every device multiplies
HIGH = 1 << 31
WORD_BITS = 16
STATE_BYTES = 4
HEAD_BYTES = 4  # of a record: step, check, quiet turns (two)
LARGEST = 127  # absolute integer of a record: an escape's is a byte
COST_BITS = 8  # costs are integers of 1/256 bit: their sums do not depend on the order
MAX_SYMBOLS = 256  # 8 + 12 + 12 bits of an entry of the decoding table
MAX_QUIET = (1 << 16) - 1  # turns, two bytes of a record


def decoding_table(frequencies: np.ndarray) -> np.ndarray:
    """int32 (rows * 4096): symbol << 24 | (frequency - 1) << 12 | place in the symbol's interval.

    frequencies  integers (rows, S), each row summing to 4096
    """
    rows, symbols = frequencies.shape
    counts = frequencies.astype(np.int64)
    starts = (np.cumsum(counts, axis=1) - counts).reshape(-1)
    entries = (np.arange(symbols) << 24) | ((counts - 1) << PRECISION_BITS)
    table = np.repeat(entries.reshape(-1), counts.reshape(-1))
    table |= np.tile(np.arange(TOTAL), rows) - np.repeat(starts, counts.reshape(-1))
    packed: np.ndarray = table.astype(np.uint32).view(np.int32)
    return packed


def lowest_states(turns: int, quiet: Tensor) -> Tensor:
    """int32 (T, B, 1): below which a lane takes a word, 2^15 and 0 in the quiet turns."""
    import torch

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
        import torch

        self.state = state
        self.words = words
        self.lowest = lowest
        self.turns = 0
        self.taken = torch.zeros((len(words), 1), dtype=torch.int64, device=words.device)

    def turn(self, table: Tensor, first_entry: Tensor) -> Tensor:
        """Entries int32 (B, L) of the decoding table, whose top byte is each lane's next symbol.

        first_entry  int32 (B, L), where in `table` each lane's row starts
        """
        import torch

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
