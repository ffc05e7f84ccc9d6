"""What a codec makes of every crop: files, the qualities that were searched for, the time."""
# n crops

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from latentds.codecs import FittedQuality, LatentCodec, PictureCodec

CHUNK = 16  # crops that are encoded or decoded at a time


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
        """What `to_arrays` laid out; KeyError or ValueError where it is none."""
        ends = np.cumsum(arrays["sizes"])
        octets = arrays["bytes"].tobytes()
        if len(octets) != ends[-1]:
            raise ValueError(f"{len(octets)} bytes for files of {ends[-1]} together")
        starts = (ends - arrays["sizes"]).tolist()
        files = [octets[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]
        qualities = [None if np.isnan(q) else float(q) for q in arrays["qualities"]]
        return Encoded(files, qualities, float(arrays["seconds"]))


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
