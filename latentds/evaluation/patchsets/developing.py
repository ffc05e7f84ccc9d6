"""How pixels, or latents, come of what is read: as they are, through a codec, or decoded.

Networks always see chunks of one size. The codebook of a codec of latents is found here too.
"""
# n patches of a request, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.autoencoders.autoencoder import Autoencoder, NetworkAutoencoder, exact_arithmetic
from latentds.codecs import LatentCodec, PictureCodec, QuantizerSpec
from latentds.codecs.latent import check_finite
from latentds.conversion.prepared import CodebookSample
from latentds.core.compiling import Compiled
from latentds.errors import WeightsError
from latentds.evaluation.patchsets.patch_set import PatchInput
from latentds.evaluation.patchsets.picture_patches import Pictures
from latentds.loading.decoding import make_lookup
from latentds.quantizers.codebooks import StoredCodebook, load_matching, tiny_codebook
from latentds.quantizers.scalar import MAX_LEVELS, AnyCodebook

CHUNK_PX = 256 * 256  # what one patch of a chunk has, at most; larger patches, fewer of them
CPU_CHUNK, GPU_CHUNK = 4, 64  # on a CPU 1 to 16 at once are equally fast
MEASURED = 256  # patches whose files are measured
MEASURED_SEARCHED = 32  # where each file's quality is searched for, which is slow
SEED = 0  # of samples: a codec is the same whatever the training's seed
FITTED_TO = 128  # patches
OF_ALL = "fitted to a sample of the patches"
OF_TRAIN = "fitted to a sample of the patches of train"


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


class LatentRoundTrip(Developer):
    """Every patch through the bytes of its latents, encoded and decoded in chunks of one size."""

    def __init__(
        self,
        codec: LatentCodec,
        device: torch.device,
        dtype: torch.dtype,
        *,
        compile: bool = False,
    ) -> None:
        self.codec, self.device = codec, device
        autoencoder = codec.autoencoder
        self.encoding = Encoding(autoencoder, codec.patch_px, device)
        self.together = self.encoding.chunk
        # Moving one to another dtype would move the encoder with it.
        decoder = autoencoder if dtype == torch.float32 else copy.deepcopy(autoencoder)
        self.decoding = Decoding(decoder, codec.patch_px, device, dtype, compile=compile)

    def develop(self, raw: np.ndarray) -> Tensor:
        stored = self.codec.quantizer.pack(self.encoding(raw))
        return self.decoding(self.codec.latents_of(stored))


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


def codebook_note(codebook: Mapping[str, Any] | None, *, test_is_apart: bool) -> list[str]:
    """A note for a run whose codebook was fitted to patches it is tested on.

    codebook       of `SourceFacts`
    test_is_apart  whether test patches are those of another split than train
    """
    origin = (codebook or {}).get("origin")
    if origin != OF_ALL and (origin != OF_TRAIN or test_is_apart):
        return []
    told = "test patches among them; --codebook avoids it"
    return [f"the codebook was {origin}, {told}"]


def find_codebook(
    config: PatchInput,
    autoencoder: Autoencoder,
    quantizer: QuantizerSpec,
    pictures: Pictures,
    device: torch.device,
) -> StoredCodebook:
    """The codebook of --codebook, tiny's own, or one fitted, with where it is from in `made`.

    Fitted to these patches, of their training split where there is one. The draw has a seed of its
    own: every fold, rank and run has the same codebook.
    raises  ContractError for a codebook of other latents, kind or levels
    """
    card = autoencoder.card
    if config.codebook is not None:
        return load_matching(config.codebook, card.latent_id, card.name)
    shipped = tiny_codebook()
    wanted = (card.latent_id, quantizer.kind, quantizer.levels)
    book = shipped.scalar
    if wanted == (shipped.latent_id, book.kind, book.levels.shape[1]):
        return dataclasses.replace(shipped, made={"origin": "shipped with tiny"})
    drawn, origin = fit_sample(pictures)
    encoding = Encoding(autoencoder, pictures.patch_px, device)
    sample = CodebookSample(FITTED_TO, "additive" if quantizer.planes else "scalar", SEED)
    for pixels in drawn.sample(FITTED_TO, SEED):
        sample.add(encoding(pixels))
    levels = quantizer.levels or MAX_LEVELS
    codebook, fitted = sample.fit(quantizer.planes or 0, quantizer.kind, levels)
    made = {"origin": origin, "seed": SEED} | fitted
    return StoredCodebook(codebook=codebook, latent_id=card.latent_id, made=made)


def fit_sample(pictures: Pictures) -> tuple[Pictures, str]:
    """The pictures to draw from, and what they are called."""
    splits = {picture.split for picture in pictures.pictures}
    if "train" not in splits or len(splits) == 1:
        return pictures, OF_ALL
    train = [number for number, p in enumerate(pictures.pictures) if p.split == "train"]
    return pictures.part(train), OF_TRAIN
