"""Latents by vaezip's Lloyd block-range quantizer, the one other codec of latents there is.

Blocks of 8x8 cells of every channel have a range of their own, 4 bits an end, within which values
are rounded to a table of levels fitted to the patch itself: no codebook comes from outside.
"""
# B batch, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.codecs.naming import QuantizerSpec
from latentds.errors import missing_extra

BLOCK = 8  # edge of a block in cells, as in vaezip's lbrq_4bit, lbrq_3bit and lbrq_2bit
RANGE_BITS = 4


@dataclasses.dataclass(frozen=True)
class LloydBlocks:
    """vaezip's lbrq at that many bits a value, its tensors one after the other, no header.

    raises  MissingExtraError where vaezip is not installed
    """

    spec: QuantizerSpec

    def __post_init__(self) -> None:
        self.codec()

    def pack(self, latents: Tensor) -> list[bytes]:
        """Codes, ranges and table of every patch of float32 latents (B, C, h, w)."""
        tensors = self.codec().encode(latents).tensors
        parts = layout(tuple(latents.shape[1:]), self.spec.bits)
        arrays = [tensors[name].numpy().astype(dtype, copy=False) for name, dtype, _ in parts]
        return [
            b"".join(array[place].tobytes() for array in arrays) for place in range(len(latents))
        ]

    def unpack(self, files: Sequence[bytes], shape: tuple[int, int, int]) -> Tensor:
        """Float32 (B, C, h, w) of such bytes, whose number is right."""
        from vaezip import EncodedTensor

        tensors = {"shape": torch.tensor([len(files), *shape])}
        rows = np.frombuffer(b"".join(files), np.uint8).reshape(len(files), -1)
        start = 0
        for name, dtype, count in layout(shape, self.spec.bits):
            end = start + count * np.dtype(dtype).itemsize
            values = np.ascontiguousarray(rows[:, start:end]).view(dtype)
            tensors[name] = torch.from_numpy(values.astype(np.dtype(dtype).newbyteorder("=")))
            start = end
        latents: Tensor = self.codec().decode(EncodedTensor(tensors))
        return latents

    def codec(self) -> Any:
        """vaezip's codec; MissingExtraError where it is not installed."""
        try:
            from vaezip.codecs import LloydBlockRangeQuantCodec
        except ImportError as error:
            raise missing_extra("vaezip", "bench") from error
        return LloydBlockRangeQuantCodec(self.spec.bits, RANGE_BITS, 1, (BLOCK, BLOCK))


def layout(shape: tuple[int, ...], bits: int) -> list[tuple[str, str, int]]:
    """vaezip's name, the type and the number of the values of a patch's tensors, in order."""
    channels, height, width = shape
    blocks = channels * math.ceil(height / BLOCK) * math.ceil(width / BLOCK)
    range_bytes = -(-blocks * RANGE_BITS // 8)
    return [
        ("codes", "u1", -(-blocks * BLOCK * BLOCK * bits // 8)),
        ("range_lower", "u1", range_bytes),
        ("range_upper", "u1", range_bytes),
        ("channel_min", "<f4", channels),
        ("channel_max", "<f4", channels),
        ("table", "<f2", 2**bits),
    ]


def block_bytes(shape: tuple[int, int, int], bits: int) -> int:
    """Bytes of a patch's latents (C, h, w), by arithmetic."""
    return sum(count * np.dtype(dtype).itemsize for _, dtype, count in layout(shape, bits))
