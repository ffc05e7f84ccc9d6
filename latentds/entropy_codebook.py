"""Codebooks of entropy-coded records: steps, gains and frequency tables, checked and identified.

A patch's latents, times a gain a channel and divided by a step of its own, are rounded to integers
and coded by fixed tables into a record of fixed size. docs/format.md has the layout.
"""
# B patches, C latent channels, h w latent cells, K classes of tables, S symbols, R record bytes,
# L lanes

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from latentds import entropy_records
from latentds.entropy_records import DecodedRecords
from latentds.errors import ShapeError
from latentds.rans import MAX_SYMBOLS, STATE_BYTES, TOTAL

KIND = "rans"
MAX_STEPS = 256  # one byte of the record
MAX_RECORD_BYTES = 1 << 20
MAX_CHANNELS = 1024
MAX_CELLS = 1 << 16
MAX_CLASSES = 64
MAX_LANES = 64
MAX_TABLE_VALUES = 1 << 22
FLOATS = (1e-20, 1e20)  # of steps and gains: their quotients stay within float32


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EntropyCodebook:
    """How latents become records of `record_bytes` and integers again.

    latents_shape  (C, h, w)
    record_bytes   R, of every patch
    lanes          L, a divisor of w: streams a record interleaves
    steps          float32 (at most 256,) ascending: quantization steps a record may name
    gains          float32 (C,): an integer q of channel c stands for q * (step / gains[c])
    tables         uint16 (K, C, S), frequencies that sum to 4096 each: symbol i < S - 1 stands for
                   the integer i - (S - 2) / 2, the last one for an escape, whose integer is a byte
                   of its own; only an escape's must not be 0
    """

    latents_shape: tuple[int, int, int]
    record_bytes: int
    lanes: int
    steps: np.ndarray
    gains: np.ndarray
    tables: np.ndarray
    kind: str = KIND

    def __post_init__(self) -> None:
        check_shape(self)
        check_numbers("steps", self.steps, MAX_STEPS)
        check_numbers("gains", self.gains, MAX_CHANNELS)
        if (np.diff(self.steps) <= 0).any():
            raise ValueError("codebook steps are not ascending")
        if len(self.gains) != self.latents_shape[0]:
            raise ShapeError(
                f"codebook has {len(self.gains)} gains for {self.latents_shape[0]} channels"
            )
        check_tables(self)
        least = entropy_records.least_bytes(self)
        if least > self.record_bytes:
            raise ValueError(
                f"records of {self.record_bytes} bytes; these tables and {self.lanes} lanes need "
                f"{least} for any patch. Use more bytes or fewer lanes"
            )

    @property
    def magnitude(self) -> int:
        """Largest absolute integer the tables hold; others are escapes."""
        return (int(self.tables.shape[2]) - 2) // 2

    @property
    def codebook_id(self) -> str:
        """Identity: sha256 of "rans C h w R L steps K S", a newline and the little-endian arrays."""
        words = (*self.latents_shape, self.record_bytes, self.lanes, len(self.steps))
        words += (self.tables.shape[0], self.tables.shape[2])
        digest = hashlib.sha256(" ".join([KIND, *map(str, words)]).encode() + b"\n")
        for values, dtype in ((self.steps, "<f4"), (self.gains, "<f4"), (self.tables, "<u2")):
            digest.update(np.ascontiguousarray(values, dtype).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def quantize(self, latents: Tensor) -> Tensor:
        """Records uint8 (B, R) of latents float (B, C, h, w): the finest step that fits, each.

        The same bytes whatever the batch, the threads and the device; computed on the CPU.
        raises  ShapeError for other latents, ValueError on NaN or infinity
        """
        return entropy_records.encode_records(latents, self)

    def integers(self, records: Tensor) -> DecodedRecords:
        """The integers, steps and soundness of records uint8 (B, R), on their device.

        raises  ShapeError for other records, ValueError for a step byte beyond the steps
        """
        return entropy_records.decode_records(records, self)

    def dequantize(self, records: Tensor) -> Tensor:
        """Latents float32 (B, C, h, w) of records uint8 (B, R), on their device."""
        return entropy_records.latents_of(self.integers(records), self)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All fields as arrays, as a safetensors file or a JSON record keeps them."""
        head = np.array([*self.latents_shape, self.record_bytes, self.lanes], np.int32)
        return {"head": head, "steps": self.steps, "gains": self.gains, "tables": self.tables}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any]) -> EntropyCodebook:
        """The codebook that `to_arrays` wrote; KeyError, ValueError or ShapeError if damaged."""
        head = np.asarray(arrays["head"])
        if head.shape != (5,) or head.dtype.kind not in "iu":
            raise ShapeError(f"codebook head is {head.dtype} {head.shape}, not 5 integers")
        channels, rows, columns, record_bytes, lanes = (int(value) for value in head)
        return EntropyCodebook(
            latents_shape=(channels, rows, columns),
            record_bytes=record_bytes,
            lanes=lanes,
            steps=np.asarray(arrays["steps"]),
            gains=np.asarray(arrays["gains"]),
            tables=np.asarray(arrays["tables"]),
        )


def check_shape(codebook: EntropyCodebook) -> None:
    """Refuse sizes that are not positive, too large, or do not go together."""
    channels, rows, columns = codebook.latents_shape
    if not (0 < channels <= MAX_CHANNELS and min(rows, columns) > 0):
        raise ValueError(f"codebook is for latents of {codebook.latents_shape}; refused")
    if rows * columns > MAX_CELLS:
        raise ValueError(f"codebook is for {rows}x{columns} cells; at most {MAX_CELLS} are allowed")
    if not 0 < codebook.lanes <= MAX_LANES or columns % codebook.lanes:
        raise ValueError(
            f"codebook has {codebook.lanes} lanes; 1 to {MAX_LANES} that divide the {columns} "
            "columns are allowed"
        )
    if not 2 + STATE_BYTES * codebook.lanes < codebook.record_bytes <= MAX_RECORD_BYTES:
        raise ValueError(
            f"records of {codebook.record_bytes} bytes; more than "
            f"{2 + STATE_BYTES * codebook.lanes} and at most {MAX_RECORD_BYTES} are allowed"
        )


def check_numbers(name: str, values: np.ndarray, most: int) -> None:
    """Refuse anything but 1 to `most` positive float32 numbers of a sane size."""
    if values.dtype != np.float32 or values.ndim != 1 or not 0 < len(values) <= most:
        raise ShapeError(
            f"codebook {name} are {values.dtype} {values.shape}, not 1 to {most} float32"
        )
    low, high = FLOATS
    if not ((values >= low) & (values <= high)).all():
        raise ValueError(f"codebook {name} are not all within {low} and {high}")


def check_tables(codebook: EntropyCodebook) -> None:
    """Refuse tables whose shape, sums or escapes are wrong."""
    tables = codebook.tables
    if tables.dtype != np.uint16 or tables.ndim != 3 or tables.size > MAX_TABLE_VALUES:
        raise ShapeError(f"codebook tables are {tables.dtype} {tables.shape}, not uint16 (K, C, S)")
    classes, channels, symbols = tables.shape
    if channels != codebook.latents_shape[0] or not 0 < classes <= MAX_CLASSES:
        raise ShapeError(
            f"codebook tables are of {classes} classes and {channels} channels; 1 to {MAX_CLASSES} "
            f"and {codebook.latents_shape[0]} are right"
        )
    if symbols % 2 or not 4 <= symbols <= MAX_SYMBOLS:
        raise ShapeError(f"codebook tables have {symbols} symbols, not an even number of 4 to 256")
    sums = tables.sum(axis=2, dtype=np.int64)
    if (sums != TOTAL).any():
        place = tuple(int(i) for i in np.argwhere(sums != TOTAL)[0])
        raise ValueError(f"codebook table {place} sums to {sums[place]}, not {TOTAL}")
    if (tables[:, :, -1] == 0).any() or (tables[:, :, (symbols - 2) // 2] == 0).any():
        raise ValueError("codebook tables give zero or the escape no frequency; both need one")
