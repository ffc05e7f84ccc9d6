"""What an embedder is to the rest of the library: a card, embed, to; how images are prepared."""
# B batch, D embedding dimensions, H W pixels

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from latentds.errors import ShapeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedderCard:
    """Where an embedder comes from, and what it makes of an image.

    name           short name; for local weights, that of the file
    class_name     network class, or timm's name of the network
    dim            D; 0 where only the weights can tell
    rule           how an image becomes the network's input, in words
    resize_px      what the shorter edge is resized to first; None for no resizing
    input_px       edge of the centre crop the network sees; None for the whole image
    multiple_px    what both edges of the network's input must be multiples of
    interpolation  of the resizing, always with antialiasing: bicubic or bilinear
    mean, std      of the normalization, in [0, 1] units, one a channel
    repository     Hub repository, None where the weights are not on the Hub
    revision       pinned commit of the repository; None where none could be pinned
    file           weights within the repository
    licence        of the weights
    gated          whether the Hub asks for a login and an accepted licence
    weights_id     hash of the tensors; empty until the weights are loaded
    """

    name: str
    class_name: str
    dim: int = 0
    rule: str = ""
    resize_px: int | None = 224
    input_px: int | None = 224
    multiple_px: int = 1
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    repository: str | None = None
    revision: str | None = None
    file: str = "model.safetensors"
    licence: str = "unknown"
    gated: bool = False
    weights_id: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Embedder(Protocol):
    """What users may pass wherever an embedder is asked for."""

    card: EmbedderCard

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings float32 (B, D) of images (B, 3, H, W) in [0, 1], gradients kept."""
        ...

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Any: ...


class Preparation(nn.Module):
    """Images (B, 3, H, W) in [0, 1] resized, cropped and normalized as a card says.

    Differentiable, float32, never clamped or rounded, so that a decoder trained through it is told
    of values out of range. Pillow, which rounds, differs by about a level of 255 at most, and by
    more only where it clips what bicubic resizing overshoots.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, card: EmbedderCard) -> None:
        super().__init__()
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.card.resize_px:
            images = resize_shorter_edge(images, self.card.resize_px, self.card.interpolation)
        if self.card.input_px:
            images = centre_crop(images, self.card.input_px)
        height, width = images.shape[-2:]
        if height % self.card.multiple_px or width % self.card.multiple_px:
            raise ShapeError(
                f"{self.card.name}: images of {width}x{height} px; without resizing, both edges "
                f"must be multiples of {self.card.multiple_px}"
            )
        return (images - self.mean) / self.std


def without_resizing(card: EmbedderCard) -> EmbedderCard:
    """The card of the same network fed whole images; ShapeError where it takes one size alone."""
    if card.multiple_px == 1:
        raise ShapeError(f"{card.name}: made for one size of input; it cannot be loaded as native")
    rule = f"whole images, edges multiples of {card.multiple_px} px, neither resized nor cropped"
    return dataclasses.replace(card, rule=rule, resize_px=None, input_px=None)


def resize_shorter_edge(images: Tensor, edge_px: int, interpolation: str) -> Tensor:
    """Images (B, 3, H, W) whose shorter edge is `edge_px`, antialiased; unchanged if it is already.

    The longer edge is rounded down, as torchvision's Resize does.
    """
    height, width = images.shape[-2:]
    shorter = min(height, width)
    if shorter == edge_px:
        return images
    size = (edge_px * height // shorter, edge_px * width // shorter)
    return resize(images, size, interpolation)


def resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Images (B, 3, H, W) of that size, antialiased."""
    return functional.interpolate(
        images, size, mode=interpolation, antialias=True, align_corners=False
    )


def centre_crop(images: Tensor, edge_px: int) -> Tensor:
    """The middle square of images at least as large, placed as torchvision's CenterCrop does."""
    height, width = images.shape[-2:]
    if height < edge_px or width < edge_px:
        raise ShapeError(f"images of {width}x{height} px are smaller than the crop of {edge_px} px")
    top, left = round((height - edge_px) / 2), round((width - edge_px) / 2)
    return images[..., top : top + edge_px, left : left + edge_px]


class ClassToken(nn.Module):
    """The class token of a network of tokens, (B, D), or the mean of others beside it, (B, 2 D).

    network    prepared images to tokens (B, T, D), the class token first
    mean_from  the first of the tokens that the mean is of: that of a patch, behind registers
    """

    def __init__(self, network: nn.Module, mean_from: int | None) -> None:
        super().__init__()
        self.network, self.mean_from = network, mean_from

    def forward(self, prepared: Tensor) -> Tensor:
        tokens: Tensor = self.network(prepared)
        if self.mean_from is None:
            return tokens[:, 0]
        return torch.cat([tokens[:, 0], tokens[:, self.mean_from :].mean(1)], 1)


class NetworkEmbedder:
    """An embedder made of a torch network, frozen and in eval mode.

    card        its card, identity included
    network     prepared images to (B, D)
    prepare     images (B, 3, H, W) in [0, 1] to what the network sees, in float32
    """

    def __init__(self, card: EmbedderCard, network: nn.Module, prepare: nn.Module) -> None:
        self.card = card
        self.network = network.eval().requires_grad_(False)
        self.prepare = prepare.eval().requires_grad_(False)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings float32 (B, D); keeps gradients to the images where autograd is on.

        images  float (B, 3, H, W) in [0, 1]; values beyond are neither clamped nor rounded
        raises  ShapeError for another layout, or a size the network cannot take
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ShapeError(
                f"{self.card.name}: images are {images.dtype} {tuple(images.shape)}; "
                "floats (B, 3, H, W) in [0, 1] are wanted"
            )
        prepared = self.prepare(images.to(self.device, torch.float32))
        embeddings: Tensor = self.network(prepared.to(self.dtype))
        if embeddings.shape != (len(images), self.card.dim):
            raise ShapeError(
                f"{self.card.name}: the network gave {tuple(embeddings.shape)}, "
                f"not {(len(images), self.card.dim)}; its embedding is not one vector an image"
            )
        return embeddings.float()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> NetworkEmbedder:
        """Self, its weights moved; images are prepared in float32 whatever the dtype."""
        self.device = torch.device(device) if device is not None else self.device
        self.dtype = dtype or self.dtype
        self.network.to(self.device, self.dtype)
        self.prepare.to(self.device)
        return self
