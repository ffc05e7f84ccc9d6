"""Codecs of latents with their codebooks: stored ones, or fitted on other pictures or these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from latentds_tools.fidelity.fidelity_plan import Autoencoders

from latentds.codecs import LatentCodec, LatentSpec, draw_samples, with_quantizer
from latentds.codecs.quantizers import latent_shape
from latentds.errors import ContractError, InputError
from latentds.quantizers.codebooks import (
    StoredCodebook,
    load_codebook,
    shipped_records,
    tiny_codebook,
)
from latentds.quantizers.entropy.record_fit import fit_entropy_codebook

ENCODE_BATCH = 16
ON_TESTED = "fitted on the tested crops themselves"


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
    """Makes codecs of latents; the latents of one autoencoder's fit sample are kept.

    sample  pictures to fit on
    stored  codebooks used for latents of their latent_id, kind, and levels, planes or bytes
    """

    def __init__(
        self, autoencoders: Autoencoders, sample: FitSample, stored: dict[str, StoredCodebook],
        seed: int, patch_px: tuple[int, int],
    ) -> None:  # fmt: skip
        self.autoencoders, self.sample, self.stored, self.seed = autoencoders, sample, stored, seed
        self.patch_px = patch_px
        self._samples: tuple[str, Any] | None = None

    def origin(self, spec: LatentSpec) -> dict[str, Any] | None:
        """Where a row's codebook comes from, known before anything is encoded; None for none."""
        if not spec.quantizer.is_fitted and spec.quantizer.record_bytes is None:
            return None
        found = self.find_stored(spec)
        if found is not None:
            name, stored = found
            return {"origin": name, "codebook_id": stored.codebook.codebook_id}
        return self.fitted()

    def fitted(self) -> dict[str, Any]:
        return {
            "origin": self.sample.origin,
            "crops": len(self.sample.images),
            "digest": self.sample.digest,
            "seed": self.seed,
        }

    def find_stored(self, spec: LatentSpec) -> tuple[str, StoredCodebook] | None:
        """The stored codebook that fits a row, and its name."""
        latent_id, wanted = self.autoencoders.cards[spec.name].latent_id, spec.quantizer
        for name, stored in self.stored.items():
            if (stored.latent_id, stored.codebook.text) == (latent_id, wanted.text):
                return name, stored
        if wanted.record_bytes is not None:
            card = self.autoencoders.cards[spec.name]
            shape = latent_shape(card, self.patch_px)
            shipped = shipped_records(latent_id, shape, wanted.record_bytes)
            return (f"shipped with {card.encoder or card.name}", shipped) if shipped else None
        return None

    def make(self, spec: LatentSpec) -> LatentCodec:
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


def stored_codebooks(
    path: Path | None, cards: dict[str, Any], refit: bool
) -> dict[str, StoredCodebook]:
    """The codebook of --codebook, and tiny's own unless `refit`; by what they are called.

    raises  ContractError for a codebook of latents that no listed autoencoder makes
    """
    found = {}
    if path is not None:
        found[path.name] = load_codebook(path)
        if found[path.name].latent_id not in {card.latent_id for card in cards.values()}:
            raise ContractError(f"{path}: fitted to latents that none of --codecs makes")
    if not refit:
        found["shipped with tiny"] = tiny_codebook()
    return found
