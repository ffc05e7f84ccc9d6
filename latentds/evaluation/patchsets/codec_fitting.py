"""The codebook of a codec on the fly: from a file, tiny's own, or fitted to a sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentds.autoencoders.autoencoder import Autoencoder
from latentds.codecs import QuantizerSpec, draw_samples, fit_quantizer
from latentds.errors import ContractError, InputError
from latentds.evaluation.patchsets.coded_patches import SEED, Encoding
from latentds.evaluation.patchsets.patch_set_config import PatchInput
from latentds.evaluation.patchsets.picture_patches import Pictures, open_pictures
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, tiny_codebook

FITTED_TO = 128  # patches
OF_ALL = "fitted to a sample of the patches"
OF_TRAIN = "fitted to a sample of the patches of train"


def codebook_note(codebook: Mapping[str, Any], *, test_is_apart: bool) -> str | None:
    """A note for a run whose codebook was fitted to patches it is tested on, None for others.

    codebook       of `SourceFacts`
    test_is_apart  whether test patches are those of another split than train
    """
    origin = codebook.get("origin")
    if origin != OF_ALL and (origin != OF_TRAIN or test_is_apart):
        return None
    return (
        f"the codebook was {origin}, test patches among them; --codebook or --codebook-from "
        "avoids it"
    )


def find_codebook(
    config: PatchInput,
    autoencoder: Autoencoder,
    quantizer: QuantizerSpec,
    pictures: Pictures,
    device: torch.device,
) -> StoredCodebook:
    """The codebook of --codebook, tiny's own, or one fitted, with where it is from in `made`.

    Fitted to patches of --codebook-from, else to these, of their training split where there is
    one. The draw has a seed of its own: every fold, rank and run has the same codebook.
    raises  ContractError for a codebook of other latents, kind or levels
    """
    card = autoencoder.card
    if config.codebook is not None:
        return stored_in(config.codebook, card.latent_id, card.name)
    shipped = tiny_codebook()
    wanted = (card.latent_id, quantizer.kind, quantizer.levels)
    book = shipped.scalar
    is_asked_for = config.codebook_from is None
    if is_asked_for and wanted == (shipped.latent_id, book.kind, book.levels.shape[1]):
        return dataclasses.replace(shipped, made={"origin": "shipped with tiny"})
    sample, origin = fit_sample(config, pictures)
    encoding = Encoding(autoencoder, pictures.patch_px, device)
    parts = [encoding(pixels) for pixels in sample.sample(FITTED_TO, SEED)]
    latents = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
    samples = draw_samples(latents[None, :, :, None])
    codebook, report = fit_quantizer(samples, quantizer, SEED)
    made = {"origin": origin, "patches": sum(map(len, parts)), "seed": SEED} | report.to_json()
    return StoredCodebook(codebook=codebook, latent_id=card.latent_id, made=made)


def stored_in(path: Path, latent_id: str, name: str) -> StoredCodebook:
    """The codebook in a file; ContractError where it was fitted to other latents."""
    stored = load_codebook(path)
    if stored.latent_id != latent_id:
        raise ContractError(
            f"--codebook {path}: fitted to other latents than {name!r} makes; fit one with "
            "'latentds fit-codebook'"
        )
    made = {"origin": "from a codebook file", "file": path.name, "fit": stored.made}
    return dataclasses.replace(stored, made=made)


def fit_sample(config: PatchInput, pictures: Pictures) -> tuple[Pictures, str]:
    """The pictures to draw from, and what they are called."""
    if config.codebook_from is None:
        splits = {picture.split for picture in pictures.pictures}
        if "train" not in splits or len(splits) == 1:
            return pictures, OF_ALL
        return pictures.of_split("train"), OF_TRAIN
    edge = min(pictures.patch_px)
    others = PatchInput(
        data=config.codebook_from, tile=True, patch_size=edge, use_labels=False,
        split_folders=False, workers=config.workers, max_px=config.max_px,
    )  # fmt: skip
    if not config.codebook_from.is_dir():
        raise InputError(f"--codebook-from {config.codebook_from}: no such folder")
    return open_pictures(others), f"fitted to a sample of {config.codebook_from.name}"
