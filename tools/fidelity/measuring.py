"""One row: what a codec makes of every crop, and what comes out beside the original."""
# n crops (B of a batch), k of them shown on the page, D embedding dimensions, H W pixels

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from latentds.codecs import FittedQuality, LatentCodec, PictureCodec
from latentds.errors import ShapeError
from latentds.store.golden import psnr_db

CHUNK = 16  # crops that are encoded or decoded at a time
PEAK = 255
SMALL = ((0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2)  # Wang et al. 2004: keep quotients from 0 / 0
SIGMA, REACH = 1.5, 5  # of their Gaussian window, pixels

SSIM_SETTINGS = (
    "Gaussian window with sigma 1.5 (11x11), population covariance, mean over RGB channels, data "
    "range 255 (Wang et al. 2004)"
)
PSNR_SETTINGS = "8-bit RGB, data range 255, from the squared error of all three channels of a patch"
SIMILARITY_SETTINGS = (
    "cosine of the embeddings of the original and of the reconstruction rounded to 8 bits"
)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The files of all crops, in their order.

    qualities  those that were searched for, None where none was
    seconds    of encoding all, without the search
    """

    files: list[bytes]
    qualities: list[float | None]
    seconds: float

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As a file keeps it: the bytes end to end with the sizes (n,); NaN for no quality."""
        return {
            "bytes": np.frombuffer(b"".join(self.files), np.uint8),
            "sizes": np.array([len(file) for file in self.files]),
            "qualities": np.array(self.qualities, np.float64),
            "seconds": np.array(self.seconds),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> Encoded:
        """What `to_arrays` laid out; KeyError where it is none."""
        parts = np.split(arrays["bytes"], np.cumsum(arrays["sizes"])[:-1])
        qualities = [None if np.isnan(q) else float(q) for q in arrays["qualities"]]
        return Encoded([part.tobytes() for part in parts], qualities, float(arrays["seconds"]))


def encode_all(
    codec: PictureCodec | LatentCodec, images: Sequence[np.ndarray], tick: Callable[[int], object]
) -> Encoded:
    """The files of all crops; `tick` is told how many are done."""
    if isinstance(codec, PictureCodec) and codec.quality is None:
        return encode_searched(codec, images, tick)
    codec.encode_batch(images[:1])  # first calls set things up
    files: list[bytes] = []
    began = time.perf_counter()
    for start in range(0, len(images), CHUNK):
        files += codec.encode_batch(images[start : start + CHUNK])
        tick(len(files) - start)
    return Encoded(files, [None] * len(files), time.perf_counter() - began)


def encode_searched(
    codec: PictureCodec, images: Sequence[np.ndarray], tick: Callable[[int], object]
) -> Encoded:
    """The files at the qualities that a search finds, of each crop or of all together."""
    fitted: list[FittedQuality] = []
    if codec.mean_bytes is not None:
        fitted = codec.fit_all(images)
        tick(len(images))
    else:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(codec.fit, images):  # up to 14 files a picture are made
                fitted.append(found)
                tick(1)
    began = time.perf_counter()
    files = [
        codec.coding.encode(image, found.quality or 0)
        for image, found in zip(images, fitted, strict=True)
    ]
    return Encoded(files, [found.quality for found in fitted], time.perf_counter() - began)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a row's codec did to every crop.

    per_crop  bytes, psnr_db (None where the reconstruction is equal), ssim, quality (None where
              it was not searched), similarity by embedder, downstream by figure, and for
              entropy-coded records step, its index: lists in the order of the crops
    seconds   encode, decode: time for all crops
    shown     uint8 (k, H, W, 3): reconstructions for the page
    """

    per_crop: dict[str, Any]
    seconds: dict[str, float]
    shown: np.ndarray

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As a file keeps it: all but the pictures as JSON."""
        text = json.dumps({"per_crop": self.per_crop, "seconds": self.seconds}, allow_nan=False)
        return {"shown": self.shown, "figures": np.frombuffer(text.encode(), np.uint8)}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> Measured:
        """What `to_arrays` laid out; KeyError where it is none."""
        return Measured(shown=arrays["shown"], **json.loads(arrays["figures"].tobytes()))


class MeasuredOriginals:
    """The crops, and their embeddings, which are computed when first asked for."""

    def __init__(self, images: Sequence[np.ndarray], embedders: dict[str, Any]) -> None:
        self.images, self.embedders = images, embedders
        self._embeddings: dict[str, np.ndarray] = {}

    def embeddings(self, name: str) -> np.ndarray:
        """Float32 (crops, D)."""
        if name not in self._embeddings:
            starts = range(0, len(self.images), CHUNK)
            parts = [embed(self.embedders[name], self.images[s : s + CHUNK]) for s in starts]
            self._embeddings[name] = np.concatenate(parts)
        return self._embeddings[name]


def measure(
    codec: PictureCodec | LatentCodec, encoded: Encoded, originals: MeasuredOriginals,
    contact: Sequence[int], tick: Callable[[int], object], judges: Sequence[Any] = (),
) -> Measured:  # fmt: skip
    """All figures of one codec's files; `tick` is told how many crops are done.

    judges  of judges.py: have downstream figures of reconstructions and their embeddings
    """
    images = originals.images
    codec.decode_batch(encoded.files[:1])  # first calls set things up
    columns: dict[str, list[Any]] = {
        "bytes": [len(file) for file in encoded.files],
        "quality": encoded.qualities,
        "psnr_db": [],
        "ssim": [],
    }
    if isinstance(codec, LatentCodec) and codec.quantizer.spec.record_bytes is not None:
        columns["step"] = [file[0] for file in encoded.files]
    similarity: dict[str, list[float]] = {name: [] for name in originals.embedders}
    figures: dict[str, list[Any]] = {}
    seconds = {"encode": encoded.seconds, "decode": 0.0}
    shown: dict[int, np.ndarray] = {}
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        began = time.perf_counter()
        decoded = codec.decode_batch(encoded.files[start : start + CHUNK])
        seconds["decode"] += time.perf_counter() - began
        for made, image in zip(decoded, part, strict=True):
            psnr = psnr_db(made, image)
            columns["psnr_db"].append(psnr if math.isfinite(psnr) else None)  # as JSON has it
            columns["ssim"].append(ssim(made, image))
        embeddings = {name: embed(e, decoded) for name, e in originals.embedders.items()}
        for name, vectors in embeddings.items():
            wanted = originals.embeddings(name)[start : start + len(part)]
            similarity[name] += cosines(vectors, wanted).tolist()
        for judge in judges:
            for name, values in judge.score(start, decoded, embeddings).items():
                figures.setdefault(name, []).extend(values)
        shown |= {n: decoded[n - start] for n in contact if start <= n < start + len(part)}
        tick(len(part))
    found = {**columns, "similarity": similarity, "downstream": figures}
    return Measured(found, seconds, np.stack([shown[n] for n in contact]))


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """SSIM of uint8 (H, W, 3) pictures as Wang et al. 2004, mean over all windows within them.

    Gaussian window of 11x11, sigma 1.5, population covariance, mean over channels.
    raises  ShapeError for pictures smaller than a window
    """
    weights = np.exp(-np.square(np.arange(-REACH, REACH + 1)) / (2 * SIGMA**2))
    weights /= weights.sum()
    if min(image.shape[:2]) < len(weights):
        raise ShapeError(
            f"SSIM of a picture of {image.shape[1]}x{image.shape[0]} px; its window is "
            f"{len(weights)} px, take larger pictures"
        )
    a, b = image.astype(np.float64), reference.astype(np.float64)
    maps = [window_means(values, weights) for values in (a, b, a * a, b * b, a * b)]
    mean_a, mean_b, square_a, square_b, product = maps
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    above = (2 * mean_a * mean_b + SMALL[0]) * (2 * covariance + SMALL[1])
    below = (mean_a**2 + mean_b**2 + SMALL[0]) * (variances + SMALL[1])
    return float((above / below).mean())


def window_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means (H - n + 1, W - n + 1, 3) of the windows within values (H, W, 3)."""
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis)
        values = windows @ weights
    return values


def to_images(pictures: Sequence[np.ndarray]) -> Any:
    """Float tensor (B, 3, H, W) in [0, 1] of uint8 pictures."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255)


def embed(embedder: Any, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Embeddings float32 (B, D) of uint8 pictures."""
    with torch.no_grad():
        embeddings: np.ndarray = embedder.embed(to_images(pictures)).float().cpu().numpy()
    return embeddings


def cosines(embeddings: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Cosine similarity (B,) of embeddings (B, D), never above 1; 1 for two of all zeros."""
    a, b = embeddings.astype(np.float64), references.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(norms == 0, 0.0, (a * b).sum(axis=1) / norms)
    return np.where(equal, 1.0, np.clip(values, -1.0, 1.0))
