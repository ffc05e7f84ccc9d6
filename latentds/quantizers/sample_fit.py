"""Fit a codebook to a sample of patches: which are drawn, and how many latent values are held."""
# N patches, M values a channel, C latent channels, h w latent cells

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.errors import InputError
from latentds.quantizers.additive_fit import fit_additive
from latentds.quantizers.entropy.record_fit import MAX_FIT_PATCHES, fit_entropy_codebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook
from latentds.quantizers.scalar_fit import fit_codebook

MAX_SAMPLE_VALUES = 1 << 24  # held while fitting, 64 MB: 512 patches of 32 x 32 x 32


def draw_rows(
    splits: Mapping[str, Sequence[int]], count: int, seed: int, *, shuffled: bool, stream: int = 1
) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of patches of the training split, the first where there is none, and how they came.

    splits    rows of the patches of every split
    shuffled  in random order, as records need them, whose fit may take the first of them alone;
              else they ascend
    stream    of the seed's random numbers
    """
    split = "train" if "train" in splits else next(iter(splits))
    rows, rng = splits[split], np.random.default_rng([seed, stream])
    places = rng.choice(len(rows), min(count, len(rows)), replace=False)
    drawn = np.array([rows[place] for place in np.sort(places).tolist()])
    return rng.permutation(drawn) if shuffled else drawn, {"split": split, "seed": seed}


class CodebookSample:
    """Latents of patches that a codebook is fitted to.

    Of more than 16 million values some are left out: cells of every patch, or patches of records.

    count  patches there will be, at most
    kind   of the codes: scalar, additive or rans
    """

    def __init__(self, count: int, kind: str = "scalar", seed: int = 0) -> None:
        self.count, self.kind, self.seed = count, kind, seed
        self.rng = np.random.default_rng([seed, 3])
        self.held: list[Tensor] = []

    def add(self, latents: Tensor) -> bool:
        """Hold latents float32 (N, C, h, w); False once no more will be used."""
        patches = latents.cpu()
        if self.kind == "rans":
            most = min(MAX_FIT_PATCHES, max(1, MAX_SAMPLE_VALUES // patches[0].numel()))
            self.held = [*self.held, *patches][:most]
            return len(self.held) < most
        most = max(16, MAX_SAMPLE_VALUES // (patches.shape[1] * self.count))  # cells of a patch
        for values in patches.flatten(2):
            cells = values.shape[1]
            chosen = self.rng.choice(cells, most, replace=False) if most < cells else slice(None)
            self.held.append(values[:, chosen])
        return True

    def fit(
        self,
        size: int = 0,
        quantizer: str = "kmeans",
        levels: int = MAX_LEVELS,
        gains: np.ndarray | None = None,
    ) -> tuple[AnyCodebook, dict[str, Any]]:
        """The codebook, how many patches it was fitted to, and what it does to them.

        size    planes of additive codes, bytes of a record
        gains   of records, see `fit_entropy_codebook`
        raises  InputError for no patch, and for bytes that records of these latents cannot have
        """
        if not self.held:
            raise InputError("none of the patches drawn for the codebook can be read")
        made: dict[str, Any] = {"patches": len(self.held)}
        if self.kind == "rans":
            try:
                records, fitted = fit_entropy_codebook(torch.stack(self.held), size, gains=gains)
            except ValueError as error:
                raise InputError(f"--bytes {size}: {error}") from error
            return records, made | {"record_fit": fitted.to_json()}
        samples = torch.cat(self.held, 1).numpy()
        if self.kind == "additive":
            vectors, of_vectors = fit_additive(samples.T, size, levels=levels, seed=self.seed)
            return vectors, made | of_vectors.to_json()
        codebook, of_levels = fit_codebook(samples, quantizer, levels, self.seed)
        return codebook, made | of_levels.to_json()
