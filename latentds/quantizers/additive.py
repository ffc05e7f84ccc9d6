"""Additive codebooks: a latent vector is the sum of one table row of each of S code planes.

Scalar codebooks (S = D), product quantization with or without a rotation, and residual vector
quantization are one thing here, so that they are stored, read and compared by one code path.
"""
# B batch, S code planes, K rows of a plane's table, D latent channels, h w latent cells,
# N vectors, W sums kept a vector

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
OVERLAP = 1e-9  # squared cosine between two planes' tables; float32 rounding leaves about 1e-14
GROUP = 32  # topk of 2,048 costs takes 5 times as long as the minima of 64 groups, then topk of 256


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

    def dequantize(self, codes: Tensor) -> Tensor:
        """The sums that codes stand for: float32 (B, D, h, w) on the codes' device.

        codes    uint8 (B, S, h, w)
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
        rows = self.table(codes.device).flatten(0, 1)
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


def is_separable(tables: np.ndarray) -> bool:
    """Whether every two planes' tables (S, K, D) vary in orthogonal directions.

    Then each plane can be searched by itself, and the greedy search is exact.
    """
    centred = tables.astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    moments = np.einsum("skd,ske->sde", centred, centred).reshape(len(tables), -1)
    norms = np.linalg.norm(moments, axis=1)
    # trace(M_s M_t) is the squared norm of all inner products between two planes' rows
    overlap = moments @ moments.T
    limit = OVERLAP * np.outer(norms, norms)
    np.fill_diagonal(limit, np.inf)
    return bool((overlap <= limit).all())


def search(vectors: Tensor, table: Tensor, beam: int) -> Tensor:
    """Codes uint8 (N, S) of vectors (N, D), by the `beam` best sums after each plane.

    table  float32 (S, K, D) on the vectors' device
    """
    import torch

    planes = len(table)
    # What all sums share is taken off both sides: |r|^2 - 2 r.t + |t|^2 cancels badly far from 0.
    shift = table[0].mean(0)
    residuals = (vectors - shift)[:, None]
    paths = torch.empty(len(vectors), 1, 0, dtype=torch.uint8, device=vectors.device)
    for plane in range(planes):
        rows = table[plane] - shift if plane == 0 else table[plane]
        keep = 1 if plane == planes - 1 else beam
        parents, codes = best_children(residuals, rows, keep)
        # Greedy and first planes have one parent: nothing to gather.
        if residuals.shape[1] > 1:
            residuals = residuals.gather(1, parents[..., None].expand(-1, -1, rows.shape[1]))
            paths = paths.gather(1, parents[..., None].expand(-1, -1, plane))
        residuals = residuals - rows[codes]
        paths = torch.cat([paths.expand(-1, codes.shape[1], -1), codes.byte()[..., None]], dim=2)
    return paths[:, 0]


def best_children(residuals: Tensor, rows: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which sums (N, keep) go on with which rows: those that leave the least.

    residuals  (N, W, D)
    rows       (K, D)
    """
    import torch

    count, width, channels = residuals.shape
    costs = torch.addmm(rows.square().sum(1), residuals.view(-1, channels), rows.T, alpha=-2)
    costs = costs.view(count, width, -1)
    if width > 1:
        costs = costs + residuals.square().sum(2, keepdim=True)
    flat = costs.flatten(1)
    keep = min(keep, flat.shape[1])
    best = flat.argmin(1, keepdim=True) if keep == 1 else smallest(flat, keep)
    return best // len(rows), best % len(rows)


def smallest(costs: Tensor, keep: int) -> Tensor:
    """Indices (N, keep) of the smallest costs (N, M), ascending by cost.

    Where M is large, only within the GROUP-sized groups whose own smallest are among the smallest:
    the same result, since any other group has `keep` better ones before it.
    """
    groups = costs.shape[1] // GROUP
    if costs.shape[1] % GROUP or groups <= keep:
        return costs.topk(keep, largest=False).indices
    grouped = costs.view(len(costs), groups, GROUP)
    chosen = grouped.amin(2).topk(keep, largest=False).indices
    candidates = grouped.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1)
    best = candidates.topk(keep, largest=False).indices
    return chosen.gather(1, best // GROUP) * GROUP + best % GROUP
