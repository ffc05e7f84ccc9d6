"""Codebooks of entropy-coded records: steps, gains, the model and its tables, with an identity.

A patch's latents, times a gain a channel and divided by a step of its own, are rounded to integers
and coded by fixed tables into a record of fixed size. docs/format.md has the layout.
"""
# B patches, C latent channels, h w latent cells, K classes of tables, P parents of a channel,
# S symbols, R record bytes, L lanes

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from latentds.errors import ShapeError
from latentds.quantizers.entropy import record_checks, record_decoding, record_encoding
from latentds.quantizers.entropy.record_decoding import DecodedRecords

KIND = "rans"
ARRAYS = (  # in the order in which they are hashed
    *(("steps", "<f4"), ("gains", "<f4"), ("order", "<i2"), ("parents", "<i2")),
    *(("weights", "<i2"), ("thresholds", "<i4"), ("tables", "<u2")),
)
DTYPES = {"head": "<i4", **dict(ARRAYS)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EntropyCodebook:
    """How latents become records of `record_bytes` and integers again.

    latents_shape  (C, h, w)
    record_bytes   R, of every patch
    lanes          L, streams a record interleaves
    steps          float32 (at most 256,) ascending: quantization steps a record may name
    gains          float32 (C,): an integer q of channel c stands for q * (step / gains[c])
    tables         uint16 (K, C, S), frequencies that sum to 4096: symbol i < S - 1 stands for
                   the integer i - (S - 2) / 2, the last one for an escape, whose integer is a byte
                   of its own. Only integers of up to a channel's extent have a frequency, the same
                   ones in all classes
    order          int16 (C,): the channels in the order in which they are coded
    parents        int16 (C, P): channels coded earlier whose magnitudes tell something, -1 for none
    weights        int16 (C, 3, P + 2): what is expected of a magnitude, times 1,024: for each phase
                   of cells a constant, a weight of cells around, a weight of each parent
    thresholds     int32 (C, K - 1) ascending: expectations where a class ends
    """

    latents_shape: tuple[int, int, int]
    record_bytes: int
    lanes: int
    steps: np.ndarray
    gains: np.ndarray
    tables: np.ndarray
    order: np.ndarray
    parents: np.ndarray
    weights: np.ndarray
    thresholds: np.ndarray
    kind: str = KIND
    encoding: ClassVar[str] = KIND

    def __post_init__(self) -> None:
        record_checks.check_codebook(self)

    @property
    def text(self) -> str:
        """What tables call it: its bytes tell codebooks of one autoencoder apart."""
        return f"{KIND}:{self.record_bytes}"

    @property
    def summary(self) -> str:
        """Bytes, channels and steps, in words."""
        return (
            f"records of {self.record_bytes} bytes, {self.latents_shape[0]} channels, "
            f"{len(self.steps)} steps"
        )

    def codes_shape_of(self, latents_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(R,); ShapeError for other latents than the codebook's."""
        if tuple(latents_shape) != self.latents_shape:
            raise ShapeError(
                f"latents of shape {tuple(latents_shape)}; the codebook's records are of "
                f"{self.latents_shape}"
            )
        return (self.record_bytes,)

    def latents_shape_of(self, codes_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, h, w); ShapeError for records of another size."""
        if tuple(codes_shape) != (self.record_bytes,):
            raise ShapeError(
                f"codes of shape {tuple(codes_shape)}; the codebook's records have "
                f"{self.record_bytes} bytes"
            )
        return self.latents_shape

    def find_fault(self, codes: np.ndarray) -> str | None:
        """That a record names a step that is not there."""
        if not len(codes) or (largest := int(codes[:, 0].max())) < len(self.steps):
            return None
        return f"a record of step {largest}, but the codebook has {len(self.steps)} steps"

    @property
    def magnitude(self) -> int:
        """Largest absolute integer the tables hold; others are escapes."""
        return (int(self.tables.shape[2]) - 2) // 2

    @functools.cached_property
    def extents(self) -> np.ndarray:
        """int32 (C,): largest absolute integer of each channel that is no escape."""
        coded = self.tables[0, :, self.magnitude : -1] > 0
        extents: np.ndarray = (coded.sum(axis=1) - 1).astype(np.int32)
        return extents

    @functools.cached_property
    def codebook_id(self) -> str:
        """sha256 of "rans C h w R L steps K S P", a newline and the little-endian arrays."""
        classes, _, symbols = self.tables.shape
        sizes = (self.record_bytes, self.lanes, len(self.steps), classes, symbols)
        words = (*self.latents_shape, *sizes, self.parents.shape[1])
        digest = hashlib.sha256(" ".join([KIND, *map(str, words)]).encode() + b"\n")
        for name, dtype in ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self, name), dtype).tobytes())
        return f"sha256:{digest.hexdigest()}"

    def quantize(self, latents: Tensor, rate_weight: float = record_encoding.RATE_WEIGHT) -> Tensor:
        """Records uint8 (B, R) of latents float (B, C, h, w): the finest step that fits, each.

        The same bytes whatever the batch and the threads; computed on the CPU. A patch that does
        not fit at the coarsest step loses channels, the last coded first.

        rate_weight  what a bit is worth in squared steps when rounding; 0 takes the nearest
        raises       ShapeError for other latents, ValueError on NaN or infinity, and where records
                     are too small for some patches (`check_reach`)
        """
        return record_encoding.encode_records(latents, self, rate_weight)

    def integers(self, records: Tensor) -> DecodedRecords:
        """The integers, steps and soundness of records uint8 (B, R), on their device.

        raises  ShapeError for other records, ValueError for a step byte beyond the steps
        """
        return record_decoding.decode_records(records, self)

    def dequantize(self, records: Tensor) -> Tensor:
        """Latents float32 (B, C, h, w) of records uint8 (B, R), on their device."""
        if not len(records):
            return torch.zeros(0, *self.latents_shape, device=records.device)
        return record_decoding.latents_of(self.integers(records), self)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """All fields as arrays, as a safetensors file or a JSON record keeps them."""
        head = np.array([*self.latents_shape, self.record_bytes, self.lanes], np.int32)
        return {"head": head, **{name: getattr(self, name) for name, _ in ARRAYS}}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, arrays included."""
        record: dict[str, Any] = {"kind": self.kind}
        for name, values in self.to_arrays().items():
            octets = np.ascontiguousarray(values, DTYPES[name]).tobytes()
            encoded = base64.b64encode(octets).decode()
            record[name] = {"shape": list(values.shape), "base64": encoded}
        return record

    @staticmethod
    def from_json(record: Any) -> EntropyCodebook:
        """The codebook of `to_json`; KeyError, TypeError or ValueError where it is none."""
        arrays = {}
        for name, dtype in DTYPES.items():
            octets = base64.b64decode(record[name]["base64"], validate=True)
            values = np.frombuffer(octets, dtype).reshape(record[name]["shape"])
            arrays[name] = values.astype(values.dtype.newbyteorder("="))
        return EntropyCodebook.from_arrays(arrays, str(record["kind"]))

    @staticmethod
    def from_arrays(arrays: Mapping[str, Any], kind: str = KIND) -> EntropyCodebook:
        """The codebook that `to_arrays` wrote; KeyError, ValueError or ShapeError if damaged."""
        head = np.asarray(arrays["head"])
        if head.shape != (5,) or head.dtype.kind not in "iu":
            raise ShapeError(f"codebook head is {head.dtype} {head.shape}, not 5 integers")
        channels, rows, columns, record_bytes, lanes = (int(value) for value in head)
        return EntropyCodebook(
            latents_shape=(channels, rows, columns),
            record_bytes=record_bytes,
            lanes=lanes,
            kind=kind,
            **{name: np.asarray(arrays[name]) for name, _ in ARRAYS},
        )
