"""JPEG's quantization tables fitted to an embedder: what its own tables leave on the table.

A factor for each band of frequencies, of luma and of chroma, by coordinate search for the highest
mean similarity at equal mean bytes.
"""
# n pictures

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from latentds_tools.fidelity.quality import cosines, embed

from latentds.codecs import FORMATS, PictureCodec
from latentds.codecs.formats import JPEG_TABLES_AT_50, Format, encode_jpeg
from latentds.codecs.picture_codecs import fit_to_mean

NAME = "jpeg-fitted"
BANDS = (0, 1, 3, 6)  # sums of both frequencies at which a band begins
STEPS = (1.6, 1.25)  # factors tried up and down, one round each
PICTURES = 16


class FittedTables:
    """Tables by number of bytes, each fitted when it is first asked for."""

    def __init__(self, images: Sequence[np.ndarray], embedders: dict[str, Any]) -> None:
        places = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int)
        self.images = [images[place] for place in dict.fromkeys(places.tolist())]
        self.embedder_name = next(reversed(embedders), "")
        self.embedder = embedders.get(self.embedder_name)
        self._rules: dict[int, Format] = {}

    def codec(self, max_bytes: int | None, mean_bytes: int | None) -> PictureCodec:
        """JPEG within so many bytes, or of so many on average, with tables fitted at as many."""
        size = max_bytes or mean_bytes or 0
        if size not in self._rules:
            self._rules[size] = self.fit(size)
        return PictureCodec(NAME, None, max_bytes, mean_bytes, self._rules[size])

    def fit(self, mean_bytes: int) -> Format:
        """JPEG with the tables that keep most."""
        wanted = embed(self.embedder, self.images)
        factors = np.ones((2, len(BANDS)))
        best = self.score(factors, mean_bytes, wanted)
        for step in STEPS:
            for place in np.ndindex(factors.shape):
                for factor in (step, 1 / step):
                    tried = factors.copy()
                    tried[place] *= factor
                    score = self.score(tried, mean_bytes, wanted)
                    if score > best:
                        factors, best = tried, score
        return rules_of(factors)

    def score(self, factors: np.ndarray, mean_bytes: int, wanted: np.ndarray) -> float:
        """Mean similarity of the pictures at one quality and so many bytes on average."""
        rules = rules_of(factors)
        files = fit_to_mean(rules, self.images, mean_bytes)
        decoded = [rules.decode(file.encoded) for file in files]
        return float(cosines(embed(self.embedder, decoded), wanted).mean())


def rules_of(factors: np.ndarray) -> Format:
    """JPEG 4:2:0 with its usual tables times a factor a band; factors (2, bands)."""
    sums = np.add.outer(np.arange(8), np.arange(8)).ravel()
    bands = np.searchsorted(BANDS, sums, side="right") - 1
    encode = functools.partial(
        encode_jpeg, subsampling="4:2:0", shapes=JPEG_TABLES_AT_50 * factors[:, bands]
    )
    return dataclasses.replace(FORMATS[NAME], encode=encode)
