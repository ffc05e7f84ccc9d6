"""Codecs with their codebooks, and JPEG with its tables: stored, or fitted on pictures."""
# n pictures

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from latentds_tools.fidelity.fidelity_plan import Autoencoders
from latentds_tools.fidelity.measuring import cosines, embed

from latentds.codecs import (
    FORMATS,
    CodecSpec,
    LatentCodec,
    LatentSpec,
    PictureCodec,
    PictureSpec,
    draw_samples,
    make_picture_codec,
    with_quantizer,
)
from latentds.codecs.formats import JPEG_TABLES_AT_50, Format, encode_jpeg
from latentds.codecs.latent import latent_shape
from latentds.codecs.picture_codecs import fit_to_mean
from latentds.errors import InputError
from latentds.quantizers.codebooks import StoredCodebook, shipped_records, tiny_codebook
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook

ENCODE_BATCH = 16
ON_TESTED = "fitted on the tested crops themselves"
FITTED = "jpeg-fitted"
BANDS = (0, 1, 3, 6)  # sums of both frequencies at which a band begins
STEPS = (1.6, 1.25)  # factors tried up and down, one round each
PICTURES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class FitSample:
    """The pictures that codebooks are fitted on, where they come from, and a hash of them.

    shared  slides that tested pictures are of, too
    """

    images: Sequence[np.ndarray]
    origin: str
    digest: str
    shared: tuple[str, ...] = ()


class Codebooks:
    """Makes codecs; the latents of one autoencoder's fit sample are kept.

    sample     pictures to fit on
    embedders  by name; JPEG's tables are fitted to the last
    """

    def __init__(
        self, autoencoders: Autoencoders, sample: FitSample, seed: int, patch_px: tuple[int, int],
        embedders: dict[str, Any],
    ) -> None:  # fmt: skip
        self.autoencoders, self.sample, self.seed = autoencoders, sample, seed
        self.patch_px = patch_px
        self.tables = FittedTables(sample.images, embedders)
        self._samples: tuple[str, Any] | None = None

    def origin(self, spec: CodecSpec) -> dict[str, Any] | None:
        """Where a row's codebook or its tables come from, known before anything is encoded; None
        for neither."""
        fitted = {
            "origin": self.sample.origin,
            "crops": len(self.sample.images),
            "digest": self.sample.digest,
            "seed": self.seed,
        }
        if isinstance(spec, LatentSpec):
            if found := self.find_stored(spec):
                return {"origin": found[0], "codebook_id": found[1].codebook.codebook_id}
            has_codebook = spec.quantizer.is_fitted or spec.quantizer.record_bytes is not None
            return fitted if has_codebook else None
        if spec.name != FITTED:
            return None
        return fitted | {
            "pictures": len(self.tables.images),
            "embedder": self.tables.embedder_name,
            "weights": self.tables.embedder.card.weights_id,
        }

    def find_stored(self, spec: LatentSpec) -> tuple[str, StoredCodebook] | None:
        """The codebook that ships for a row, and its name."""
        card, wanted, tiny = self.autoencoders.cards[spec.name], spec.quantizer, tiny_codebook()
        if (tiny.latent_id, tiny.codebook.text) == (card.latent_id, wanted.text):
            return "shipped with tiny", tiny
        if wanted.record_bytes is None:
            return None
        shape = latent_shape(card, self.patch_px)
        shipped = shipped_records(card.latent_id, shape, wanted.record_bytes)
        return (f"shipped with {card.encoder or card.name}", shipped) if shipped else None

    def codec(self, spec: CodecSpec) -> PictureCodec | LatentCodec:
        """A row's codec, fitted where it has to be."""
        if isinstance(spec, PictureSpec):
            is_fitted = spec.name == FITTED
            return self.tables.codec(spec) if is_fitted else make_picture_codec(spec)
        autoencoder, quantizer = self.autoencoders.get(spec.name), spec.quantizer
        found = self.find_stored(spec)
        book = found[1].codebook if found else None
        samples = None
        if book is None and quantizer.record_bytes is not None:
            try:
                book = fit_entropy_codebook(self.encode_sample(spec), quantizer.record_bytes)[0]
            except ValueError as error:  # bytes that records cannot have
                raise InputError(f"{spec.text}: {error}") from error
        elif book is None and quantizer.is_fitted:
            samples = draw_samples(self.encode_sample(spec))
        return with_quantizer(
            autoencoder, quantizer, patch_px=self.patch_px, samples=samples, codebook=book,
            seed=self.seed,
        )  # fmt: skip

    def encode_sample(self, spec: LatentSpec) -> Any:
        """Latents (N, C, h, w) of the fit sample; encoded once for the rows of one autoencoder."""
        if self._samples is None or self._samples[0] != spec.name:
            codec = with_quantizer(self.autoencoders.get(spec.name), "none", patch_px=self.patch_px)
            images = self.sample.images
            parts = [
                codec.latents(images[start : start + ENCODE_BATCH])
                for start in range(0, len(images), ENCODE_BATCH)
            ]
            self._samples = (spec.name, torch.cat(parts))
        return self._samples[1]


class FittedTables:
    """JPEG's quantization tables by number of bytes, each fitted when it is first asked for.

    A factor for each band of frequencies, of luma and of chroma, by coordinate search for the
    embedder's highest mean similarity at equal mean bytes.
    """

    def __init__(self, images: Sequence[np.ndarray], embedders: dict[str, Any]) -> None:
        places = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int)
        self.images = [images[place] for place in dict.fromkeys(places.tolist())]
        self.embedder_name = next(reversed(embedders), "")
        self.embedder: Any = embedders.get(self.embedder_name)
        self._rules: dict[int, Format] = {}

    def codec(self, spec: PictureSpec) -> PictureCodec:
        """JPEG within so many bytes, or of so many on average, with tables fitted at as many."""
        size = spec.max_bytes or spec.mean_bytes or 0
        if size not in self._rules:
            self._rules[size] = self.fit(size)
        return PictureCodec(FITTED, None, spec.max_bytes, spec.mean_bytes, self._rules[size])

    def fit(self, mean_bytes: int) -> Format:
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
    return dataclasses.replace(FORMATS[FITTED], encode=encode)
