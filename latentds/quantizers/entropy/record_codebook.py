"""Codebooks of entropy-coded records: steps, gains, the model and its tables, with an identity.

A patch's latents, times a gain a channel and divided by a step of its own, are rounded to integers
and coded by fixed tables into a record of fixed size. docs/format.md has the layout.
"""
# B patches, C latent channels, h w latent cells, K classes of tables, P parents of a channel,
# S symbols, R record bytes, L lanes

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.errors import ShapeError
from latentds.quantizers.entropy.record_model import (
    ARRAYS,
    DTYPES,
    KIND,
    RecordModel,
    check_codebook,
)

if TYPE_CHECKING:
    from torch import Tensor

    from latentds.quantizers.entropy.record_decoding import DecodedRecords


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EntropyCodebook(RecordModel):
    """A record model that was checked, and what it does."""

    def __post_init__(self) -> None:
        check_codebook(self)

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

    def quantize(self, latents: Tensor, rate_weight: float | None = None) -> Tensor:
        """Records uint8 (B, R) of latents float (B, C, h, w): the finest step that fits, each.

        The same bytes whatever the batch and the threads; computed on the CPU. A patch that does
        not fit at the coarsest step loses channels, the last coded first.

        rate_weight  what a bit is worth in squared steps when rounding, by default the
                     codebook's own; 0 takes the nearest
        raises       ShapeError for other latents, ValueError on NaN or infinity, and where records
                     are too small for some patches (`check_reach`)
        """
        from latentds.quantizers.entropy import record_encoding

        weight = self.rate_weight if rate_weight is None else rate_weight
        return record_encoding.encode_records(latents, self, weight)

    def integers(self, records: Tensor) -> DecodedRecords:
        """The integers, steps and soundness of records uint8 (B, R), on their device.

        raises  ShapeError for other records, ValueError for a step byte beyond the steps
        """
        from latentds.quantizers.entropy import record_decoding

        return record_decoding.decode_records(records, self)

    def dequantize(self, records: Tensor) -> Tensor:
        """Latents float32 (B, C, h, w) of records uint8 (B, R), on their device."""
        import torch

        from latentds.quantizers.entropy import record_decoding

        if not len(records):
            return torch.zeros(0, *self.latents_shape, device=records.device)
        return record_decoding.latents_of(self.integers(records), self)

    def latents(self, records: np.ndarray) -> np.ndarray:
        """What `dequantize` gives, by compiled code alone: an import of torch takes seconds."""
        from latentds.quantizers.entropy.native_model import decoded_values, native_model
        from latentds.quantizers.entropy.native_streams import read_all

        channels, height, width = self.latents_shape
        integers = np.empty((len(records), channels, height * width), np.int32)
        intact = np.empty(len(records), np.bool_)
        read_all(np.ascontiguousarray(records), native_model(self), integers, intact)
        scales = decoded_values(self)[records[:, 0]]
        found: np.ndarray = integers.astype(np.float32) * scales[:, :, None]
        return found.reshape(-1, *self.latents_shape)

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
