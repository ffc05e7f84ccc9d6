"""Pixels out of latents, always in chunks of one size, and pixels that need nothing done."""
# n patches of a request, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, NetworkAutoencoder, exact_arithmetic
from latentds.core.compiling import Compiled
from latentds.loading.decoding import make_lookup
from latentds.quantizers.scalar import AnyCodebook

CHUNK_PX = 256 * 256  # what one patch of a chunk has, at most; larger patches, fewer of them
CPU_CHUNK, GPU_CHUNK = 4, 64  # on a CPU 1 to 16 at once are equally fast


def chunk_size(device: torch.device, patch_px: tuple[int, int]) -> int:
    """Patches that go through a network at once on a device."""
    most = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
    return max(1, min(most, most * CHUNK_PX // (patch_px[0] * patch_px[1])))


def in_chunks(function: Callable[[Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """A network's results (n, ...) for values (n, ...), computed `size` at a time.

    The last chunk is filled up with zeros: the last bits of a float convolution depend on how many
    patches go through it at once, but not on which, nor on the place of a patch among them.
    """
    results = []
    for part in torch.split(values, size):
        missing = size - len(part)
        filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        results.append(function(filled)[: len(part)])
    return torch.cat(results)


def to_bytes(images: Tensor) -> Tensor:
    """Images (n, 3, H, W) in [0, 1] rounded to uint8."""
    return images.float().clamp(0, 1).mul(255).round().byte()


class Decoding:
    """Latents to pixels with the decoder of an autoencoder, moved to the device.

    compile  with torch.compile: chunks have one size, so that it compiles once
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        patch_px: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        self.autoencoder: Autoencoder = autoencoder.to(device, dtype)
        self.patch_px, self.device, self.dtype = patch_px, device, dtype
        self.chunk = chunk_size(device, patch_px)
        self.format = torch.contiguous_format
        if device.type == "cuda" and dtype == torch.bfloat16:  # what tensor cores read
            self.format = torch.channels_last
            if isinstance(autoencoder, NetworkAutoencoder):
                autoencoder.decoder.to(memory_format=self.format)
        self.decode = Compiled(self.decode_chunk) if compile else self.decode_chunk

    def decode_chunk(self, latents: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) of one chunk."""
        height, width = self.patch_px
        latents = latents.contiguous(memory_format=self.format)
        return to_bytes(self.autoencoder.decode(latents)[:, :, :height, :width])

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) of latents (n, C, h, w), the padding to the factor cut off."""
        with exact_arithmetic():
            return in_chunks(self.decode, latents.to(self.device, self.dtype), self.chunk)


def sent(values: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device; to a GPU through pinned memory, without waiting for it."""
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Developer:
    """How pixels, or latents, come of what is stored.

    device    where they come on
    together  patches that cost no more than one: a stream's small requests are put together
    """

    device: torch.device
    together: int

    def prepare(self, raw: Any) -> Any:
        """Work of the CPU's threads, done ahead; called from several of them."""
        return raw

    def develop(self, raw: Any) -> Tensor:
        """uint8 (n, 3, H, W) on the device, or latents."""
        raise NotImplementedError


class PlainPixels(Developer):
    """Pixels uint8 (n, H, W, 3) as they are."""

    def __init__(self, device: torch.device, workers: int) -> None:
        self.device, self.together = device, workers

    def develop(self, raw: np.ndarray) -> Tensor:
        return sent(raw, self.device).permute(0, 3, 1, 2).contiguous()


Codes = tuple[np.ndarray, np.ndarray]  # uint8 (n, *codes_shape), and which codebook each has


class UndecodedCodes(Developer):
    """Stored codes to latents, by their codebooks."""

    together = GPU_CHUNK

    def __init__(
        self, codebooks: Sequence[AnyCodebook], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.has_many, self.device = len(codebooks) > 1, device
        self.lookup = make_lookup(codebooks, device, dtype)

    def develop(self, raw: Codes) -> Tensor:
        codes, books = (sent(values, self.device) for values in raw)
        return self.lookup(codes, books if self.has_many else None)


class DecodedCodes(UndecodedCodes):
    """Stored codes to pixels."""

    def __init__(self, decoding: Decoding, codebooks: Sequence[AnyCodebook]) -> None:
        super().__init__(codebooks, decoding.device, decoding.dtype)
        self.decoding, self.together = decoding, decoding.chunk

    def develop(self, raw: Codes) -> Tensor:
        return self.decoding(super().develop(raw))
