"""What entropy-coded records are made with: steps, gains, the model and its tables."""
# C latent channels, h w latent cells, K classes of tables, P parents of a channel, S symbols,
# R record bytes, L lanes

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import ClassVar

import numpy as np

KIND = "rans"
# What a bit is worth, in squared steps, when a value is rounded towards zero. At tiny-v2's 2,048
# bytes 0.1 dB better than the nearest on H&E, at 4,096 the same; 0.1 loses similarity.
RATE_WEIGHT = 0.04
ARRAYS = (  # in the order in which they are hashed
    *(("steps", "<f4"), ("gains", "<f4"), ("order", "<i2"), ("parents", "<i2")),
    *(("weights", "<i2"), ("thresholds", "<i4"), ("tables", "<u2")),
)
DTYPES = {"head": "<i4", **dict(ARRAYS)}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RecordModel:
    """How latents become records of `record_bytes` and integers again; checked by its codebook.

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

    @property
    def magnitude(self) -> int:
        """Largest absolute integer the tables hold; others are escapes."""
        return (int(self.tables.shape[2]) - 2) // 2

    @property
    def turns(self) -> list[int]:
        """Turns of a channel's three phases: every lane codes a value in each."""
        _, height, width = self.latents_shape
        even, odd = -(-height // 2) * -(-width // 2), (height // 2) * (width // 2)
        return [-(-n // self.lanes) for n in (even, odd, height * width - even - odd)]

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
