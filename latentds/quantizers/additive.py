"""Additive codebooks: a latent vector is the sum of one table row of each of S code planes.

Scalar codebooks (S = D), product quantization with or without a rotation, and residual vector
quantization are one thing here, so that they are stored, read and compared by one code path.
"""
# B batch, S code planes, K rows of a plane's table, D latent channels, h w latent cells

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from latentds.errors import ShapeError
from latentds.quantizers.scalar import MAX_LEVELS, beyond

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_PLANES = 256
MAX_CHANNELS = 512  # four times those of DC-AE f64; the test for orthogonality holds S D D values
MAX_BEAM = 64
BEAM = 8  # 16 bring 0.02 dB more at twice the time
CHUNK = 1024  # latent cells searched at once: a patch of 256 px at f8


@dataclasses.dataclass(frozen=True, eq=False)
class AdditiveCodebook:
    """Tables whose rows are added up.

    tables  float32 (S, K, D), finite: code k of plane s adds tables[s, k] to a cell's latents
    kind    how it was made: additive-grouped, additive-residual, additive-scalar (told, never
            acted on)
    """

    tables: np.ndarray
    kind: str

    def __post_init__(self) -> None:
        if self.tables.ndim != 3 or self.tables.dtype != np.float32:
            raise ShapeError(
                f"codebook tables are {self.tables.dtype} {self.tables.shape}, not float32 "
                "(S, K, D)"
            )
        for size, most, name in zip(
            self.tables.shape, (MAX_PLANES, MAX_LEVELS, MAX_CHANNELS),
            ("code planes", "rows a plane", "channels"), strict=True,
        ):  # fmt: skip
            if not 1 <= size <= most:
                raise ShapeError(f"additive codebook has {size} {name}; 1 to {most} are possible")
        # A sum of S rows below this cannot overflow either.
        if not (np.abs(self.tables) < np.finfo(np.float32).max / MAX_PLANES).all():
            raise ValueError("codebook tables must be finite and their sums within float32")

    encoding: ClassVar[str] = "u8-sum"  # a byte a plane and cell, a row of the plane's table

    @property
    def text(self) -> str:
        """What tables call it: sum and its planes, which are its bytes a latent cell."""
        return f"sum:{self.planes}"

    @property
    def summary(self) -> str:
        """Planes, rows and channels, in words."""
        return f"{self.planes} planes of {self.centroids} vectors of {self.channels} channels"

    @property
    def codebook_id(self) -> str:
        """Identity of the tables: sha256 of "sum S K D" and the little-endian float32 values."""
        digest = hashlib.sha256("sum {} {} {}\n".format(*self.tables.shape).encode())
        digest.update(self.tables.astype("<f4").tobytes())
        return f"sha256:{digest.hexdigest()}"

    @property
    def planes(self) -> int:
        """S, the code planes: bytes a latent cell."""
        return int(self.tables.shape[0])

    @property
    def centroids(self) -> int:
        """K, the rows of a plane's table."""
        return int(self.tables.shape[1])

    @property
    def channels(self) -> int:
        """D, the channels of the latents."""
        return int(self.tables.shape[2])

    def codes_shape_of(self, latents_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(S, h, w) of the codes of latents (D, h, w); ShapeError for other channels."""
        self._check_channels(latents_shape)
        return self.planes, latents_shape[1], latents_shape[2]

    def latents_shape_of(self, codes_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(D, h, w) of the latents of codes (S, h, w); ShapeError for other planes."""
        self._check_planes(codes_shape)
        return self.channels, codes_shape[1], codes_shape[2]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The tables as a float32 tensor (S, K, D) on `device`."""
        import torch

        return torch.from_numpy(self.tables.copy()).to(device)

    def quantize(self, latents: Tensor, beam: int = BEAM) -> Tensor:
        """Codes whose rows add up to nearly the latents.

        latents  float (B, D, h, w), unscaled encoder output; any device
        beam     sums kept a cell from plane to plane; 1 is greedy. No effect where the planes'
                 tables are orthogonal: there one is exact
        returns  uint8 (B, S, h, w) on the same device. A patch's codes do not depend on the rest
                 of its batch: it is searched by itself
        raises   ShapeError for another number of channels, ValueError on NaN or infinity
        source   beam search over planes, Babenko and Lempitsky 2014, section 3.2
        """
        import torch

        from latentds.quantizers.additive_search import is_separable, search

        if not 1 <= beam <= MAX_BEAM:
            raise ValueError(f"beam {beam} is not between 1 and {MAX_BEAM}")
        if latents.ndim != 4:
            raise ShapeError(f"latents of shape {tuple(latents.shape)}, expected (B, D, h, w)")
        shape = self.codes_shape_of((latents.shape[1], latents.shape[2], latents.shape[3]))
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("latents contain NaN or infinity; encode in float32")
        width = 1 if is_separable(self.tables) else beam
        table = self.table(latents.device)
        codes = torch.empty(len(latents), *shape, dtype=torch.uint8, device=latents.device)
        for patch, into in zip(latents, codes, strict=True):
            cells = patch.float().flatten(1).T.contiguous()
            found = torch.cat([search(part, table, width) for part in cells.split(CHUNK)])
            into.copy_(found.T.view(shape))
        return codes

    def dequantize(self, codes: Tensor, table: Tensor | None = None) -> Tensor:
        """The sums that codes stand for: float32 (B, D, h, w) on the codes' device.

        codes    uint8 (B, S, h, w)
        table    `table(device)` kept from before, to spare its copy
        returns  rows added from plane 0 to plane S - 1, each sum rounded to float32: with the
                 order fixed, every machine that rounds to nearest gives the same bits
        raises   ShapeError for another number of planes, IndexError for a code beyond K
        """
        import torch
        from torch.nn import functional

        if codes.ndim != 4:
            raise ShapeError(f"codes of shape {tuple(codes.shape)}, expected (B, S, h, w)")
        self._check_planes(tuple(codes.shape[1:]))
        if self.centroids < MAX_LEVELS and codes.numel() and int(codes.max()) >= self.centroids:
            raise IndexError(
                f"code {int(codes.max())} in codes, but the codebook has {self.centroids} rows a "
                "plane"
            )
        rows = (self.table(codes.device) if table is None else table).flatten(0, 1)
        batch, planes, height, width = codes.shape
        first = self.centroids * torch.arange(planes, device=codes.device, dtype=torch.int32)
        index = codes.permute(0, 2, 3, 1).reshape(-1, planes).int() + first
        sums = functional.embedding_bag(index, rows, mode="sum")
        return sums.view(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()

    def latents(self, codes: np.ndarray) -> np.ndarray:
        """What `dequantize` gives, to the bit, in NumPy: an import of torch takes seconds."""
        sums = self.tables[0][codes[:, 0]]
        for table, plane in zip(self.tables[1:], codes[:, 1:].swapaxes(0, 1), strict=True):
            sums += table[plane]
        moved: np.ndarray = np.moveaxis(sums, -1, 1)
        return moved

    def find_fault(self, codes: np.ndarray) -> str | None:
        """That a code lies beyond tables of fewer than 256 rows."""
        return beyond(codes, self.centroids, "rows a plane")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, tables included."""
        return {
            "kind": self.kind,
            "planes": self.planes,
            "levels": self.centroids,
            "channels": self.channels,
            "values_f32le_base64": base64.b64encode(self.tables.astype("<f4").tobytes()).decode(),
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The tables, by name."""
        return {"tables": self.tables}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], kind: str) -> AdditiveCodebook:
        """The codebook that `to_arrays` took apart."""
        return AdditiveCodebook(arrays["tables"], kind)

    @staticmethod
    def from_json(record: Any) -> AdditiveCodebook:
        """The codebook of `to_json`; KeyError, TypeError or ValueError where it is none."""
        values = base64.b64decode(record["values_f32le_base64"], validate=True)
        shape = (record["planes"], record["levels"], record["channels"])
        if any(type(size) is not int or size < 1 for size in shape):
            raise ValueError(f"{shape} are not planes, levels and channels of a codebook")
        tables = np.frombuffer(values, "<f4").reshape(shape).astype(np.float32)
        return AdditiveCodebook(tables, str(record["kind"]))

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[0] != self.channels:
            raise ShapeError(
                f"latents of shape {tuple(shape)} do not fit an additive codebook of "
                f"{self.channels} channels"
            )

    def _check_planes(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 3 or shape[0] != self.planes:
            raise ShapeError(
                f"codes of shape {tuple(shape)} do not fit an additive codebook of "
                f"{self.planes} planes"
            )
