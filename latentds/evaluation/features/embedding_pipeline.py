"""Images in, features out: embedded, and brought to the host behind the work.

One thread queues all work of a GPU, decoding and embedding, for what decoding sets of torch's
arithmetic is set for the process. It does not wait for the device: a batch's features are taken
when `BEHIND` later ones are queued, and written while those are computed.
"""
# n patches of a batch, D embedding dimensions, H W pixels

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentds.embedders.embedder import Embedder

BEHIND = 2  # batches queued on a GPU behind the one whose features are awaited


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A batch of a bag on its way.

    bag       whatever the batch belongs to
    coords    int64 (n, 2)
    images    uint8 (n, 3, H, W) on the device; None once they are embedded
    features  float32 (n, D) on the host; None before
    error     why the bag ends here; then there is nothing else
    """

    bag: Any
    coords: np.ndarray
    images: Tensor | None = None
    features: np.ndarray | None = None
    error: Exception | None = None


def embed_pieces(
    pieces: Iterator[Piece], embedders: Sequence[Embedder], device: torch.device
) -> Generator[Piece, None, None]:
    """The pieces with features instead of images, in order; those of an error as they are."""
    behind = BEHIND if device.type == "cuda" else 0
    queued: deque[tuple[Piece, Callable[[], np.ndarray] | None]] = deque()

    def oldest() -> Piece:
        piece, take = queued.popleft()
        return dataclasses.replace(piece, images=None, features=take()) if take else piece

    for piece in pieces:
        queued.append((piece, None if piece.images is None else embed(embedders, piece.images)))
        if len(queued) > behind:
            yield oldest()
    while queued:
        yield oldest()


@torch.inference_mode()
def embed(embedders: Sequence[Embedder], images: Tensor) -> Callable[[], np.ndarray]:
    """What gives features float32 (n, sum of D) of images uint8 (n, 3, H, W), side by side.

    On a GPU their embedding is queued, and their copy to pinned memory, which the result waits for.
    """
    prepared = images.float().div_(255)
    parts = [embedder.embed(prepared) for embedder in embedders]
    features = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if features.device.type != "cuda":
        made: np.ndarray = features.cpu().numpy()
        return lambda: made
    host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
    host.copy_(features, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()

    def take() -> np.ndarray:
        done.synchronize()
        features: np.ndarray = host.numpy().copy()  # the pinned block is free for the next ones
        return features

    return take
