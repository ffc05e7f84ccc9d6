"""Scalar quantization of latents: a codebook of at most 256 sorted levels, nearest level, and back.

K-means, per-channel K-means and evenly spaced int8 are one thing here, a table of levels, so that
they are stored, read and compared by one code path.
"""
# B batch, C latent channels, K levels of a codebook, R rows of a codebook (1 or C), h w latent
# cells

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from latentds.errors import ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_LEVELS = 256


class AnyCodebook(Protocol):
    """What every kind of codebook offers; scalar levels are one of three kinds.

    encoding     name of the format's encoding that its bytes have
    kind         how it was made; told, never acted on
    codebook_id  identity of its tables
    summary      sizes of its tables in a few words, for people
    text         what tables call it
    codes_shape_of, latents_shape_of   shapes of a patch's codes and latents (C, h, w); ShapeError
                 where they do not fit the tables
    quantize     codes uint8 (B, *codes_shape) of latents float (B, C, h, w)
    dequantize   latents float32 (B, C, h, w) of such codes, on their device
    find_fault   what is wrong with codes (N, *codes_shape) of a checked file; None for nothing
    to_json, to_arrays   its tables: plain JSON values; arrays by name, as a codebook file has them
    """

    @property
    def kind(self) -> str: ...

    @property
    def encoding(self) -> str: ...

    @property
    def codebook_id(self) -> str: ...

    @property
    def summary(self) -> str: ...

    @property
    def text(self) -> str: ...

    def codes_shape_of(self, latents_shape: tuple[int, int, int]) -> tuple[int, ...]: ...

    def latents_shape_of(self, codes_shape: tuple[int, ...]) -> tuple[int, int, int]: ...

    def quantize(self, latents: Tensor) -> Tensor: ...

    def dequantize(self, codes: Tensor) -> Tensor: ...

    def find_fault(self, codes: np.ndarray) -> str | None: ...

    def to_json(self) -> dict[str, Any]: ...

    def to_arrays(self) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """Levels that latents are rounded to.

    levels  float32 (R, K), each row ascending; R is 1 (one table for all) or the number of channels
    kind    how it was made: one of `scalar_fit.KINDS`
            (told, never acted on)
    """

    levels: np.ndarray
    kind: str

    def __post_init__(self) -> None:
        if self.levels.ndim != 2 or self.levels.dtype != np.float32:
            raise ShapeError(
                f"codebook levels are {self.levels.dtype} {self.levels.shape}, not float32 (R, K)"
            )
        if not 1 <= self.levels.shape[1] <= MAX_LEVELS:
            raise ShapeError(
                f"codebook has {self.levels.shape[1]} levels; 1 to {MAX_LEVELS} fit a byte"
            )
        if not np.isfinite(self.levels).all() or (np.diff(self.levels, axis=1) < 0).any():
            raise ValueError("codebook levels must be finite and ascending in every row")

    @property
    def codebook_id(self) -> str:
        """Identity of the levels: sha256 of "R K" and the little-endian float32 table."""
        rows, levels = self.levels.shape
        digest = hashlib.sha256(f"{rows} {levels}\n".encode())
        digest.update(self.levels.astype("<f4").tobytes())
        return f"sha256:{digest.hexdigest()}"

    encoding: ClassVar[str] = "u8"  # one byte a latent value, an index into the levels

    @property
    def text(self) -> str:
        """What tables call it: its kind, and its levels where they are not 256."""
        levels = self.levels.shape[1]
        return self.kind if levels == MAX_LEVELS else f"{self.kind}:{levels}"

    @property
    def summary(self) -> str:
        """Rows and levels, in words."""
        return "{}x{} levels".format(*self.levels.shape)

    def codes_shape_of(self, latents_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, h, w): a code a value; ShapeError for channels that the rows do not fit."""
        check_channels(latents_shape, self)
        return latents_shape

    def latents_shape_of(self, codes_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, h, w): a value a code; ShapeError for channels that the rows do not fit."""
        check_channels(codes_shape, self)
        return codes_shape[0], codes_shape[1], codes_shape[2]

    def quantize(self, latents: Tensor) -> Tensor:
        """Index of the nearest level of every latent value.

        latents   float (B, C, h, w), unscaled encoder output; any device
        returns   uint8 (B, C, h, w) on the same device; ties go to the lower index
        raises    ShapeError if C differs from a per-channel codebook's rows, ValueError on NaN or
                  infinity
        source    scalar K-means, Lloyd 1982; Yellapragada et al. 2025, section 3.3
        """
        import torch

        check_channels(latents.shape[1:], self)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("latents contain NaN or infinity; encode in float32")
        # Midpoints and a binary search: exact and 28 times as fast as an argmin over distances;
        # cdist's default mode even picked a wrong level for 0.06 % of values.
        levels = self.table(latents.device)
        thresholds = (levels[:, 1:] + levels[:, :-1]) / 2
        values = latents.float().contiguous()
        if len(thresholds) == 1:
            return torch.bucketize(values, thresholds[0]).to(torch.uint8)
        by_channel = values.transpose(0, 1).flatten(1).contiguous()
        codes = torch.searchsorted(thresholds, by_channel).to(torch.uint8)
        batch, channels, *cells = values.shape
        return codes.view(channels, batch, *cells).transpose(0, 1).contiguous()

    def dequantize(self, codes: Tensor) -> Tensor:
        """The level of every code: float32 (B, C, h, w) on the codes' device, by one gather.

        raises    ShapeError for a wrong number of channels, IndexError for a code beyond K
        """
        import torch

        check_channels(codes.shape[1:], self)
        levels = self.table(codes.device)
        rows, count = levels.shape
        if count < MAX_LEVELS and codes.numel() and int(codes.max()) >= count:
            raise IndexError(f"code {int(codes.max())}, but the codebook has {count} levels")
        index = codes.int()
        if rows > 1:
            index = index + count * torch.arange(rows, device=codes.device).view(1, -1, 1, 1)
        return levels.view(-1)[index]

    def find_fault(self, codes: np.ndarray) -> str | None:
        """That a code lies beyond a codebook of fewer than 256 levels."""
        return beyond(codes, self.levels.shape[1], "levels")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, levels included."""
        rows, levels = self.levels.shape
        values = base64.b64encode(self.levels.astype("<f4").tobytes()).decode()
        return {"kind": self.kind, "rows": rows, "levels": levels, "values_f32le_base64": values}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The levels, by name."""
        return {"levels": self.levels}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], kind: str) -> Codebook:
        """The codebook that `to_arrays` took apart."""
        return Codebook(arrays["levels"], kind)

    @staticmethod
    def from_json(record: Any) -> Codebook:
        """The codebook that `to_json` described."""
        values = base64.b64decode(record["values_f32le_base64"], validate=True)
        levels = np.frombuffer(values, "<f4").reshape(record["rows"], record["levels"])
        return Codebook(levels.astype(np.float32), str(record["kind"]))

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels as a float32 tensor (R, K) on `device`."""
        import torch

        return torch.from_numpy(self.levels.copy()).to(device)


def quantize(latents: Tensor, codebook: AnyCodebook) -> Tensor:
    """Codes uint8 (B, *codes_shape) of latents float (B, C, h, w), by any kind of codebook."""
    return codebook.quantize(latents)


def dequantize(codes: Tensor, codebook: AnyCodebook) -> Tensor:
    """Latents float32 (B, C, h, w) of codes uint8 (B, *codes_shape), by any kind of codebook."""
    return codebook.dequantize(codes)


def dequantize_each(codes: Tensor, books: np.ndarray, codebooks: Sequence[AnyCodebook]) -> Tensor:
    """Float32 (B, C, h, w): latents of every patch's codes by its own codebook.

    books     int64 (B,), which of `codebooks` each patch has
    raises    as `dequantize`
    """
    import torch

    if len(codebooks) == 1:
        return dequantize(codes, codebooks[0])
    shape = codebooks[0].latents_shape_of(tuple(codes.shape[1:]))
    latents = torch.empty(len(codes), *shape, dtype=torch.float32)
    for number in np.unique(books).tolist():
        places = torch.from_numpy(books == number)
        latents[places] = dequantize(codes[places], codebooks[number])
    return latents


def beyond(codes: np.ndarray, count: int, names: str) -> str | None:
    """That codes lie beyond the `count` entries of a table, in words; None where none does."""
    if count == MAX_LEVELS or not codes.size or (largest := int(codes.max())) < count:
        return None
    return f"code {largest}, but the codebook has {count} {names}"


def check_channels(shape: Sequence[int], codebook: Codebook) -> None:
    """Raise ShapeError unless latents of shape (C, h, w) fit the codebook's rows."""
    rows = len(codebook.levels)
    if len(shape) != 3 or rows not in (1, shape[0]):
        raise ShapeError(f"values of shape {tuple(shape)} do not fit {rows} codebook rows")
