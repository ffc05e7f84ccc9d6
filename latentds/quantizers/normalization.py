"""Mean and spread of every latent channel, and codebooks whose levels are normalized by them."""
# C latent channels, R K rows and levels of a codebook, S sets

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentds.quantizers.additive import AdditiveCodebook
from latentds.quantizers.scalar import AnyCodebook, Codebook

if TYPE_CHECKING:
    from torch import Tensor

DIGITS = 7  # what a float32 holds


@dataclasses.dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of every channel of dequantized latents.

    mean, std  (C,), in units of the unscaled latents; a channel that never changes has std 0
    count      values of a channel that were counted; 0 where that is not known
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": list(self.mean), "std": list(self.std), "count": self.count}

    @property
    def divisors(self) -> tuple[float, ...]:
        """What to divide by: the standard deviations, 1 for a channel that never changes."""
        return tuple(std if std > 0 else 1.0 for std in self.std)

    def normalized(self, codebook: AnyCodebook) -> AnyCodebook:
        """A codebook that gives normalized latents.

        Where latents are looked up, in another table: normalizing costs nothing there.
        """
        mean, std = np.array(self.mean), np.array(self.divisors)
        if isinstance(codebook, Codebook):
            levels = (codebook.levels - mean[:, None]) / std[:, None]
            return Codebook(levels.astype(np.float32), codebook.kind)
        if isinstance(codebook, AdditiveCodebook):
            tables = codebook.tables / std
            tables[0] -= mean / std
            return AdditiveCodebook(tables.astype(np.float32), codebook.kind)
        return Normalized(codebook, self)


class Normalized:
    """A codebook's latents, normalized after they were decoded; it does not quantize."""

    def __init__(self, codebook: AnyCodebook, statistics: ChannelStatistics) -> None:
        self.codebook, self.statistics = codebook, statistics

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.codebook, name)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Normalized latents float32 (B, C, h, w) of codes uint8 (B, *codes_shape)."""
        import torch

        latents = self.codebook.dequantize(codes)
        mean, std = (
            torch.tensor(values, device=latents.device).view(-1, 1, 1)
            for values in (self.statistics.mean, self.statistics.divisors)
        )
        return (latents - mean) / std


def parse_statistics(record: Any, channels: int) -> ChannelStatistics | None:
    """The statistics in a manifest, None where it has none; ValueError for what cannot be."""
    if record is None:
        return None
    mean, std = (tuple(float(value) for value in record[name]) for name in ("mean", "std"))
    count = record["count"]
    if len(mean) != channels or len(std) != channels or type(count) is not int or count < 0:
        raise ValueError(f"channel_statistics are not of {channels} channels")
    if not all(map(math.isfinite, mean + std)) or min(std) < 0:
        raise ValueError("channel_statistics must be finite, deviations not negative")
    return ChannelStatistics(mean, std, count)


def rounded(value: float) -> float:
    """A number to as many digits as a float32 holds."""
    return float(f"{value:.{DIGITS}g}")


def pool(parts: Sequence[ChannelStatistics], weights: Sequence[float]) -> ChannelStatistics:
    """The statistics of draws from several sets of one latent_id, by how often each is drawn.

    weights  positive, in any unit
    """
    shares = np.array(weights, np.float64) / math.fsum(weights)
    means = np.array([part.mean for part in parts])
    squares = np.array([part.std for part in parts]) ** 2 + means**2
    mean = (shares[:, None] * means).sum(0)
    std = np.sqrt(np.maximum((shares[:, None] * squares).sum(0) - mean**2, 0))
    count = sum(part.count for part in parts)
    return ChannelStatistics(
        tuple(map(rounded, mean.tolist())), tuple(map(rounded, std.tolist())), count
    )
