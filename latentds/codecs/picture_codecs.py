"""Picture formats at a quality, or at so many bytes a picture or on average: what everyone has."""
# H W pixels

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from latentds.codecs.formats import DECODE_ERRORS, FORMATS, Format, is_available
from latentds.codecs.naming import PictureSpec
from latentds.errors import FormatError, ShapeError, missing_extra

logger = logging.getLogger(__name__)

FULL = 0.995  # share of the bytes allowed from which a search does not look for a larger file


@dataclasses.dataclass(frozen=True)
class FittedQuality:
    """The file a codec makes of one picture.

    encoded  its bytes
    quality  the quality they were made at; None where the format has none
    fits     whether they are within the bytes allowed: False for a format's smallest file that is
             still larger
    """

    encoded: bytes
    quality: float | None
    fits: bool


@dataclasses.dataclass(frozen=True)
class PictureCodec:
    """A picture format at a quality, or at the best quality within so many bytes a picture.

    format      one of FORMATS
    mean_bytes  of the files that are made together, all at one quality
    rules       the format as it is coded, where that is not as in FORMATS
    raises      UnknownNameError, ValueError for a quality the format has not, MissingExtraError
    """

    format: str
    quality: float | None = None
    max_bytes: int | None = None
    mean_bytes: int | None = None
    rules: Format | None = None

    def __post_init__(self) -> None:
        if self.spec.at_equal_bytes:
            raise ValueError(f"{self.format}: needs a quality or a number of bytes")
        if not is_available(self.format):
            raise missing_extra(f"{FORMATS[self.format].label}'s library", "bench")

    @property
    def spec(self) -> PictureSpec:
        """What it is, checked."""
        return PictureSpec(
            name=self.format, quality=self.quality,
            max_bytes=self.max_bytes, mean_bytes=self.mean_bytes,
        )  # fmt: skip

    @property
    def name(self) -> str:
        return self.spec.text

    @property
    def coding(self) -> Format:
        return self.rules or FORMATS[self.format]

    def fit(self, image: np.ndarray) -> FittedQuality:
        if self.mean_bytes is not None:
            return self.fit_all([image])[0]
        if self.max_bytes is not None:
            return fit_to_bytes(self.format, image, self.max_bytes, self.rules)
        check_picture(image)
        encoded = self.coding.encode(image, self.quality or 0)
        return FittedQuality(encoded, self.quality, True)

    def fit_all(self, images: Sequence[np.ndarray]) -> list[FittedQuality]:
        if self.mean_bytes is None or not images:
            return [self.fit(image) for image in images]
        return fit_to_mean(self.coding, images, self.mean_bytes)

    def encode(self, image: np.ndarray) -> bytes:
        """The file's bytes; a warning where they cannot be as few as was asked for."""
        fitted = self.fit(image)
        if not fitted.fits:
            logger.warning("%s: the smallest file has %d bytes", self.name, len(fitted.encoded))
        return fitted.encoded

    def decode(self, encoded: bytes) -> np.ndarray:
        """The picture uint8 (H, W, 3) in a file's bytes; FormatError where there is none."""
        try:
            return self.coding.decode(encoded)
        except DECODE_ERRORS as error:
            label = FORMATS[self.format].label
            raise FormatError(
                f"{len(encoded)} bytes are no {label} picture ({type(error).__name__})"
            ) from error

    def encode_batch(self, images: Sequence[np.ndarray]) -> list[bytes]:
        if self.mean_bytes is not None:
            return [fitted.encoded for fitted in self.fit_all(images)]
        return [self.encode(image) for image in images]

    def decode_batch(self, files: Sequence[bytes]) -> list[np.ndarray]:
        return [self.decode(encoded) for encoded in files]


def fit_to_mean(
    rules: Format, images: Sequence[np.ndarray], mean_bytes: int
) -> list[FittedQuality]:
    """Files of all pictures at the one quality whose files have nearest to `mean_bytes` on average.

    By bisection; a format with few qualities may miss the mean by some per cent, either way.
    """
    for image in images:
        check_picture(image)
    assert rules.qualities is not None
    low, high = 0, round((rules.qualities[1] - rules.qualities[0]) / rules.step)
    best: list[FittedQuality] = []
    misses = float("inf")
    while low <= high:
        middle = (low + high) // 2
        quality = round(rules.qualities[0] + middle * rules.step, 6)
        files = [rules.encode(image, quality) for image in images]
        mean = sum(map(len, files)) / len(files)
        if abs(mean - mean_bytes) < misses:
            misses = abs(mean - mean_bytes)
            best = [FittedQuality(file, quality, True) for file in files]
        low, high = (middle + 1, high) if mean <= mean_bytes else (low, middle - 1)
    return best


def fit_to_bytes(
    format: str, image: np.ndarray, max_bytes: int, coding: Format | None = None
) -> FittedQuality:
    """The file of the highest quality found that has at most `max_bytes`, by bisection.

    Sizes grow with quality but for a few bytes here and there, so the search ends at, or within
    such a ripple of, the largest file that fits. The smallest file, where even that is larger.
    """
    PictureSpec(name=format, max_bytes=max_bytes)  # refuses what cannot be
    check_picture(image)
    rules = coding or FORMATS[format]
    assert rules.qualities is not None
    low, high = 0, round((rules.qualities[1] - rules.qualities[0]) / rules.step)
    best: FittedQuality | None = None
    while low <= high and (best is None or len(best.encoded) < FULL * max_bytes):
        middle = (low + high) // 2
        quality = round(rules.qualities[0] + middle * rules.step, 6)
        encoded = rules.encode(image, quality)
        if len(encoded) <= max_bytes:
            best, low = FittedQuality(encoded, quality, True), middle + 1
        else:
            high = middle - 1
    if best is None:
        lowest = rules.qualities[0]
        best = FittedQuality(rules.encode(image, lowest), lowest, False)
    return best


def check_picture(image: np.ndarray) -> None:
    """Refuse what is not uint8 (H, W, 3)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ShapeError(f"picture is {image.dtype} {image.shape}, expected uint8 (H, W, 3)")
