"""Originals through a codec on the fly: a picture format, or an autoencoder and a quantizer."""
# n patches of a request, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, exact_arithmetic
from latentds.codecs import LatentCodec, PictureCodec
from latentds.codecs.latent import check_finite
from latentds.errors import WeightsError
from latentds.evaluation.patchsets.developing import (
    Decoding,
    Developer,
    PlainPixels,
    chunk_size,
    in_chunks,
)
from latentds.evaluation.patchsets.picture_patches import Pictures

MEASURED = 256  # patches whose files are measured
MEASURED_SEARCHED = 32  # where each file's quality is searched for, which is slow
SEED = 0  # of samples: a codec is the same whatever the training's seed


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
