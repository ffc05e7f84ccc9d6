"""Originals through a codec on the fly: a picture format, or an autoencoder and a codebook."""
# n patches of a request, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, exact_arithmetic
from latentds.codecs import LatentCodec, PictureCodec, QuantizerSpec, draw_samples, fit_quantizer
from latentds.codecs.latent import check_finite
from latentds.errors import ContractError, InputError, WeightsError
from latentds.evaluation.patchsets.developing import (
    Decoding,
    Developer,
    PlainPixels,
    chunk_size,
    in_chunks,
)
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.patchsets.picture_patches import Pictures, open_pictures
from latentds.quantizers.codebooks import StoredCodebook, load_codebook, tiny_codebook

MEASURED = 256  # patches whose files are measured
MEASURED_SEARCHED = 32  # where each file's quality is searched for, which is slow
SEED = 0  # of samples: a codec is the same whatever the training's seed
FITTED_TO = 128  # patches
OF_ALL = "fitted to a sample of the patches"
OF_TRAIN = "fitted to a sample of the patches of train"


class PictureRoundTrip(PlainPixels):
    """Every patch through a file of a picture format, in threads."""

    def __init__(self, codec: PictureCodec, device: torch.device, workers: int) -> None:
        super().__init__(device, workers)
        self.codec = codec
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="codec")

    def prepare(self, raw: np.ndarray) -> np.ndarray:
        return np.stack(list(self.pool.map(self.through, raw)))

    def through(self, image: np.ndarray) -> np.ndarray:
        return self.codec.decode(self.codec.encode(image))

    def mean_bytes(self, pictures: Pictures) -> float:
        """Mean bytes of the files of patches drawn from the input."""
        count = MEASURED if self.codec.max_bytes is None else MEASURED_SEARCHED
        sizes = [
            len(encoded)
            for pixels in pictures.sample(count, SEED)
            for encoded in self.pool.map(self.codec.encode, pixels)
        ]
        return float(np.mean(sizes))


class LatentsOnTheFly(Developer):
    """Every patch's latents, through their bytes, not decoded.

    Encoded in chunks of one size, whatever was asked for together.
    normalize  what is done to them last
    """

    def __init__(self, codec: LatentCodec, device: torch.device) -> None:
        self.codec, self.device = codec, device
        self.normalize: Callable[[Tensor], Tensor] = lambda latents: latents
        self.encoding = Encoding(codec.autoencoder, codec.patch_px, device)
        self.together = self.encoding.chunk

    def develop(self, raw: np.ndarray) -> Tensor:
        return self.normalize(self.stored(raw)).to(self.device)

    def stored(self, raw: np.ndarray) -> Tensor:
        """Latents float32 (n, C, h, w) as their bytes give them back, on the CPU."""
        return self.codec.latents_of(self.codec.quantizer.pack(self.encoding(raw)))


class LatentRoundTrip(LatentsOnTheFly):
    """Every patch through the bytes of its latents, decoded in chunks of the same size."""

    def __init__(
        self,
        codec: LatentCodec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        super().__init__(codec, device)
        autoencoder = codec.autoencoder
        # Moving one to another dtype would move the encoder with it.
        decoder = autoencoder if dtype == torch.float32 else copy.deepcopy(autoencoder)
        self.decoding = Decoding(decoder, codec.patch_px, device, dtype, compile=compile)

    def develop(self, raw: np.ndarray) -> Tensor:
        return self.decoding(self.stored(raw))


class Encoding:
    """Pixels to latents with the encoder of an autoencoder, in float32, moved to the device."""

    def __init__(
        self, autoencoder: Autoencoder, patch_px: tuple[int, int], device: torch.device
    ) -> None:
        self.autoencoder: Autoencoder = autoencoder.to(device, torch.float32)
        self.device, self.chunk = device, chunk_size(device, patch_px)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Latents float32 (n, C, h, w), on the CPU, of pixels uint8 (n, H, W, 3).

        raises  WeightsError for latents that are not finite
        """

        def encode(part: Tensor) -> Tensor:
            images = part.to(self.device).permute(0, 3, 1, 2).float().div(255)
            return self.autoencoder.encode(images).float().cpu()

        with exact_arithmetic():
            latents = in_chunks(encode, torch.from_numpy(pixels), self.chunk)
        name = self.autoencoder.card.name
        error = WeightsError(f"{name}: latents contain NaN or infinity; see its weights")
        return check_finite(latents, error)


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
        train = [number for number, p in enumerate(pictures.pictures) if p.split == "train"]
        return pictures.part(train), OF_TRAIN
    edge = min(pictures.patch_px)
    others = PatchInput(
        data=config.codebook_from, tile=True, patch_size=edge, use_labels=False,
        split_folders=False, workers=config.workers, max_px=config.max_px,
    )  # fmt: skip
    if not config.codebook_from.is_dir():
        raise InputError(f"--codebook-from {config.codebook_from}: no such folder")
    return open_pictures(others), f"fitted to a sample of {config.codebook_from.name}"
