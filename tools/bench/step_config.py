"""What a bench of training steps is told, and what suits the device where it is told nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

# Steps before the clock starts, by whether there is a GPU: what the loader decoded there while
# others were timed is used up by then. A CPU decodes nothing ahead.
LEAD = {True: 3, False: 0}
GPU = {
    "arch": "vit_small_patch16_224", "batch_size": 128, "steps": 30, "out_dim": 65_536,
    "num_workers": 4, "dtype": "bfloat16",
}  # fmt: skip
CPU = {
    "arch": "vit_tiny_patch16_224", "batch_size": 2, "steps": 1, "out_dim": 4096, "num_workers": 0,
    "dtype": "float32",
}  # fmt: skip
AHEAD = 8  # batches more than are taken: at an epoch's end nothing is decoded ahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Train on cached batches and on the loader's, in turn, on one device.

    The step is a ViT of timm under DINO's loss with AdamW, in bfloat16 on a GPU. It takes cached
    views, views made of cached images, or the loader, which reads, decodes and makes views.
    Weights are random, because time does not depend on them.
    """

    folder: Annotated[Path | None, tyro.conf.Positional] = None
    """Data set. By default random codes of the decoder's shape."""
    arch: str | None = None
    """ViT of timm. By default vit_small_patch16_224 on a GPU, vit_tiny_patch16_224 elsewhere."""
    input: Literal["pixels", "latents"] = "pixels"
    """Input of the network: decoded patches, or latents without decoding, through a stem."""
    decoder: str | None = None
    """Decoder of random codes: turbo-s, turbo-m, turbo-f32, taesd, sd15, sd3, dcae-f32 (random
    weights), tiny, or a decoder's folder or name. By default turbo-s. It gives the shape of codes
    with --input latents, too."""
    batch_size: int | None = None
    """Patches a step. By default 128 on a GPU, 2 elsewhere."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of decoder and images. By default bfloat16 on a GPU, float32 elsewhere."""
    channels_last: bool = False
    """Decode with channels last."""
    compile: bool = False
    """Compile the decoder."""
    cuda_graph: bool = False
    """Decode and make views through CUDA graphs; views are timed without one too."""
    compile_views: bool = False
    """Compile the views' colour arithmetic."""
    num_workers: int | None = None
    """Processes that read codes. By default 4 on a GPU, none elsewhere."""
    globals: int = 2
    """Global crops of a patch."""
    locals: int = 8
    """Local crops of a patch."""
    global_px: int = 224
    """Edge of a global crop in pixels."""
    local_px: int = 96
    """Edge of a local crop in pixels."""
    out_dim: int | None = None
    """Prototypes of DINO's heads. By default 65,536 on a GPU, 4,096 elsewhere."""
    patch_size: int = 256
    """Edge of a random patch in pixels."""
    steps: int | None = None
    """Steps of every kind in a round. By default 30 on a GPU, 1 elsewhere."""
    rounds: int = 3
    """Rounds in which everything is measured in turn; medians are reported."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        sizes = [self.batch_size, self.steps, self.out_dim, self.rounds]
        sizes += [self.globals, self.global_px, self.local_px, self.patch_size]
        if min(1 if size is None else size for size in sizes) < 1:
            raise ValueError("batch, steps, rounds, crops and sizes are at least 1")
        if min(self.locals, self.num_workers or 0) < 0:
            raise ValueError("locals and workers are at least 0")
        if self.decoder and self.folder:
            raise ValueError("--decoder is for random codes; a set is decoded by its own")


def random_patches(config: Config, is_gpu: bool) -> int:
    """As many as all rounds take."""
    assert config.batch_size is not None and config.steps is not None
    lead = LEAD[is_gpu]
    return config.batch_size * (max(lead, 1) + config.rounds * (config.steps + lead) + AHEAD)
