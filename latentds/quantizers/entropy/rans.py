"""Interleaved range coding (rANS) of small symbols by static tables: its numbers and its table.

Integers only, so that every machine decodes the same. The layout is in docs/format.md.
"""
# S symbols; rows: table rows, one frequency table each

from __future__ import annotations

import numpy as np

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
