"""What an autoencoder is to the rest of the library: a card, encode, decode, to; its identities."""
# B batch, C latent channels, H W pixels, h w latent cells

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from latentds.core.storage import canonical_json
from latentds.errors import ShapeError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderCard:
    """Where an autoencoder comes from and what its latents are.

    name        short name, or a local folder's own name
    class_name  network class (AutoencoderKL, AutoencoderDC, AutoencoderTiny, TAESD, Tiny)
    repository  Hub repository, None for local or embedded weights
    revision    pinned commit of the repository; None where none could be pinned
    channels    C; 0 where only the weights can tell
    factor      pixels a latent cell, each way; 0 where only the weights can tell
    licence     of the weights
    gated       whether the Hub asks for a login and an accepted licence
    latent_id   what the latents mean; empty until the weights are loaded
    decoder_id  hash of the decoder; empty until the weights are loaded
    encoder     name of the autoencoder whose encoder makes the latents; empty where it is this one
    loader      "module:function" that makes the autoencoder of its card; recorded nowhere. Empty: a
                class of diffusers, from the Hub
    """

    name: str
    class_name: str
    repository: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    channels: int = 0
    factor: int = 0
    licence: str = "unknown"
    gated: bool = False
    latent_id: str = ""
    decoder_id: str = ""
    encoder: str = ""
    loader: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `encoder` only where it tells something."""
        values = dataclasses.asdict(self)
        del values["loader"]  # nothing that a file says is imported
        if not self.encoder:
            del values["encoder"]
        return values


class Autoencoder(Protocol):
    """What users may pass wherever an autoencoder is asked for."""

    card: AutoencoderCard

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w), unscaled means, of images (B, 3, H, W) in [0, 1]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, h * factor, w * factor) in [0, 1] of latents (B, C, h, w)."""
        ...

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Any:
        """Self, its weights moved."""
        ...


class NetworkAutoencoder:
    """An autoencoder made of two torch modules, both in eval mode.

    card     its card, identities included
    encoder  images (B, 3, H, W) in [0, 1], H and W multiples of the factor, to latents
    decoder  latents to images, nominally in [0, 1]
    """

    def __init__(self, card: AutoencoderCard, encoder: nn.Module, decoder: nn.Module) -> None:
        import torch

        self.card = card
        self.encoder = encoder.eval().requires_grad_(False)
        # DC-AE's decoder has 15 BatchNorm layers: in train mode a patch would depend on its batch.
        self.decoder = decoder.eval().requires_grad_(False)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, C, ceil(H/f), ceil(W/f)) of [0, 1] images, reflect-padded to the factor."""
        import torch

        if not images.is_floating_point():  # bytes would be taken for values up to 255
            raise ShapeError(
                f"{self.card.name} encodes float images in [0, 1], not {images.dtype}; divide them "
                "by 255"
            )
        padded = pad_to_factor(images, self.card.factor)
        with torch.no_grad():
            latents: Tensor = self.encoder(padded.to(self.device, self.dtype))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], clamped; keeps gradients to the latents where autograd is on."""
        images: Tensor = self.decoder(latents.to(self.device, self.dtype))
        return images.clamp(0, 1).contiguous()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NetworkAutoencoder:
        """Self, its weights moved."""
        import torch

        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        self.encoder.to(self.device, self.dtype)
        self.decoder.to(self.device, self.dtype)
        return self


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """fp32 without TF32 and deterministic cuDNN, the process's own settings restored afterwards."""
    import torch

    backends = torch.backends
    saved = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32,
             backends.cudnn.deterministic, backends.cudnn.benchmark)  # fmt: skip
    try:
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False
        backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = saved[:2]
        backends.cudnn.deterministic, backends.cudnn.benchmark = saved[2:]


def pad_to_factor(images: Tensor, factor: int) -> Tensor:
    """Images (B, 3, H, W) reflected at the right and bottom up to multiples of `factor`."""
    from torch.nn import functional

    height, width = images.shape[-2:]
    bottom, right = -height % factor, -width % factor
    if not (bottom or right):
        return images
    if bottom >= height or right >= width:
        raise ShapeError(f"images of {width}x{height} px are too small for a factor of {factor}")
    return functional.pad(images, (0, right, 0, bottom), mode="reflect")


def latent_cells(size_px: tuple[int, int], factor: int) -> tuple[int, int]:
    """(h, w) of the latents of (H, W) images."""
    return math.ceil(size_px[0] / factor), math.ceil(size_px[1] / factor)


def hash_tensors(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """`sha256:...` over facts and tensors.

    Tensors are sorted by name, each as name, shape and little-endian fp32.
    """
    import torch

    digest = hashlib.sha256(canonical_json(dict(facts)).encode())
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"\n{name} {list(values.shape)}\n".encode())
        digest.update(values.numpy().astype("<f4", copy=False).tobytes())
    return f"sha256:{digest.hexdigest()}"


def latent_identity(
    encoder_tensors: Mapping[str, Tensor], input_range: tuple[int, int], **differences: Any
) -> str:
    """The latent_id of an encoder used as latentds uses it.

    encoder_tensors  after key conversion; quant_conv included
    input_range      what the first layer sees for black and white
    differences      more facts, of encoders that are not used as the others are
    """
    facts = {
        "input_range": list(input_range),
        "padding": "reflect right and bottom to the factor",
        "sampling": "mean",
        "scale": 1,
        "shift": 0,
    } | differences
    return hash_tensors(encoder_tensors, facts)


def last_layer(decoder: nn.Module) -> nn.Parameter:
    """Weight of a decoder's last convolution before the pixels.

    The one registered last: true of every decoder here. The adaptive weight of an adversarial loss
    needs it (taming-transformers, VQGAN).
    """
    from torch import nn

    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    if not convolutions:
        raise ShapeError(f"{type(decoder).__name__}: a decoder without a convolution")
    weight = convolutions[-1].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def short(identity: str) -> str:
    """The first 12 hex digits of a `sha256:...` identity."""
    return identity.removeprefix("sha256:")[:12] or "none"
