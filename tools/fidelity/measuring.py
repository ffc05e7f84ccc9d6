"""One row: encode and decode every crop with a codec, time both, compare what comes out."""
# k crops shown on the contact sheet, D embedding dimensions, H W pixels

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.quality import cosines, embed, measure_ssim

from latentds.codecs import LatentCodec, PictureCodec

CHUNK = 16  # crops held decoded at a time


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a row's codec did to every crop.

    per_crop  bytes, psnr_db (None where the reconstruction is equal), ssim, quality (None where
              it was not searched), similarity by embedder: lists in the order of the crops
    seconds   encode, decode: time for all crops
    shown     uint8 (k, H, W, 3): reconstructions for the contact sheet
    """

    per_crop: dict[str, Any]
    seconds: dict[str, float]
    shown: np.ndarray


class Originals:
    """The crops, and their embeddings, which are computed when first asked for."""

    def __init__(self, images: Sequence[np.ndarray], embedders: dict[str, Any]) -> None:
        self.images, self.embedders = images, embedders
        self._embeddings: dict[str, np.ndarray] = {}

    def embeddings(self, name: str, tick: Callable[[int], object] | None = None) -> np.ndarray:
        """Float32 (crops, D)."""
        if name not in self._embeddings:
            parts = []
            for start in range(0, len(self.images), CHUNK):
                part = self.images[start : start + CHUNK]
                parts.append(embed(self.embedders[name], part))
                if tick:
                    tick(len(part))
            self._embeddings[name] = np.concatenate(parts)
        return self._embeddings[name]


def measure(
    codec: PictureCodec | LatentCodec, originals: Originals, ssim: str, contact: Sequence[int],
    tick: Callable[[int], object],
) -> Measured:  # fmt: skip
    """All figures of one codec; `tick` is told how many crops are done."""
    images = originals.images
    codec.decode_batch(encode_batch(codec, images[:1])[0])  # first calls set things up
    columns: dict[str, list[Any]] = {name: [] for name in ("bytes", "quality", "psnr_db", "ssim")}
    similarity: dict[str, list[float]] = {name: [] for name in originals.embedders}
    seconds = {"encode": 0.0, "decode": 0.0}
    shown: dict[int, np.ndarray] = {}
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        files, qualities, took = encode_batch(codec, part)
        seconds["encode"] += took
        began = time.perf_counter()
        decoded = codec.decode_batch(files)
        seconds["decode"] += time.perf_counter() - began
        columns["bytes"] += [len(file) for file in files]
        columns["quality"] += qualities
        columns["psnr_db"] += [
            finite_psnr(d, image) for d, image in zip(decoded, part, strict=True)
        ]
        columns["ssim"] += [measure_ssim(d, i, ssim) for d, i in zip(decoded, part, strict=True)]
        for name, embedder in originals.embedders.items():
            wanted = originals.embeddings(name)[start : start + len(part)]
            similarity[name] += cosines(embed(embedder, decoded), wanted).tolist()
        shown |= {n: decoded[n - start] for n in contact if start <= n < start + len(part)}
        tick(len(part))
    pictures = (
        np.stack([shown[n] for n in contact]) if contact else np.zeros((0, 1, 1, 3), np.uint8)
    )
    return Measured({**columns, "similarity": similarity}, seconds, pictures)


def encode_batch(
    codec: PictureCodec | LatentCodec, images: Sequence[np.ndarray]
) -> tuple[list[bytes], list[float | None], float]:
    """Files, the qualities that were searched for, and the seconds taken without the search."""
    if isinstance(codec, PictureCodec) and codec.max_bytes is not None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            fitted = list(pool.map(codec.fit, images))  # up to 14 files a picture are made
        fixed = [PictureCodec(codec.format, quality=f.quality) for f in fitted]
        began = time.perf_counter()
        files = [c.encode(image) for c, image in zip(fixed, images, strict=True)]
        return files, [f.quality for f in fitted], time.perf_counter() - began
    began = time.perf_counter()
    files = codec.encode_batch(images)
    return files, [None] * len(files), time.perf_counter() - began


def finite_psnr(image: np.ndarray, reference: np.ndarray) -> float | None:
    """PSNR in dB, None where the pictures are equal: JSON has no infinity."""
    from latentds.metrics import psnr_db

    value = psnr_db(image, reference)
    return value if math.isfinite(value) else None
