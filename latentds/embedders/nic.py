"""The pathology patch encoders of Neural Image Compression: 128-d, small, from a local file.

Topology after davidtellez/neural-image-compression (MIT; Tellez et al., TPAMI 2019), its Keras
weights in torch's layout: RGB fields of 128 px at 0.5 micrometres a pixel, mean-pooled to 64 px.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from latentds.autoencoders.autoencoder import hash_tensors
from latentds.embedders.embedder import EmbedderCard, NetworkEmbedder
from latentds.embedders.weights import fill, read_weights
from latentds.errors import ShapeError

WIDTH = 128  # channels of every layer, and of the embedding
# Edge of a field of 128 px, at 0.5 micrometres a pixel, after the encoders' own pooling.
SEEN_PX = 64
RULE = (
    "the whole patch is one field, mean-pooled to 128 px, then to 64 px: right for 256 px at "
    "0.25 micrometres a pixel and 128 px at 0.5; scaled to [-1, 1]"
)


class NicEncoder(nn.Module):
    """Fields (B, 3, 64, 64) in [-1, 1] to (B, 128): four strided convolutions and a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(WIDTH if i else 3, WIDTH, 3, stride=2))
            setattr(self, f"bn{i}", nn.BatchNorm2d(WIDTH, eps=1e-3))  # Keras's default eps
        self.fc = nn.Linear(WIDTH * 3 * 3, WIDTH)

    def forward(self, fields: Tensor) -> Tensor:
        for i in range(4):
            conv, norm = getattr(self, f"conv{i}"), getattr(self, f"bn{i}")
            fields = norm(functional.leaky_relu(conv(fields), 0.2))
        embeddings: Tensor = self.fc(fields.flatten(1))
        return embeddings


class OneField(nn.Module):
    """Images (B, 3, H, W) in [0, 1], each one field, to (B, 3, 64, 64) in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < SEEN_PX:
            raise ShapeError(f"nic: images of {width}x{height} px; at least 64 px are wanted")
        # Exact means of 2x2 and 4x4 pixels for 128 and 256 px; bins that overlap for other sizes.
        return functional.adaptive_avg_pool2d(images, SEEN_PX) * 2 - 1


def load_nic(path: Path) -> NetworkEmbedder:
    """A pathology encoder from its `.safetensors` file; WeightsError for another topology."""
    encoder = NicEncoder()
    fill(encoder, read_weights(path), path, "the NIC encoder")
    card = EmbedderCard(
        name=f"nic:{path.stem}",
        class_name="NicEncoder",
        dim=WIDTH,
        rule=RULE,
        resize_px=None,
        input_px=SEEN_PX,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        file=path.name,
        licence="see the source of the file (MIT where published by Tellez et al.)",
        weights_id=hash_tensors(encoder.state_dict(), {}),
    )
    return NetworkEmbedder(card, encoder, OneField())
