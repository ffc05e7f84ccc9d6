"""What a bench of decoders is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

DEFAULT_DECODERS = (
    "taesd,sd15,dcae-f32,tiny-v2,tiny-v2-fast,tiny-v2-cpu,tiny,turbo-s,turbo-m,turbo-f32"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Decode latents under every option, and JPEG and AVIF of real patches, on one machine.

    Latents are random, because time does not depend on them. For autoencoders with entropy-coded
    records, records of the patches are decoded too, alone and to pixels.
    """

    decoders: str = DEFAULT_DECODERS
    """Comma-separated decoders: shapes with random weights (taesd, sd15, sd3, dcae-f32, turbo-s,
    turbo-m, turbo-f32; time does not depend on weights), tiny, the name or folder of an
    autoencoder, or a decoder's folder."""
    patch_size: int = 256
    """Edge of a patch in pixels."""
    batch_sizes: tuple[int, ...] | None = None
    """Patches decoded at once. By default 64 on a GPU; on a CPU 16, or 1 beyond 50 GFLOP a
    patch."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one."""
    compile: bool = False
    """Also measure torch.compile (a C++ compiler on a CPU, minutes for large decoders)."""
    options: str | None = None
    """Measure only these, comma-separated, as in the table: 'float32,bfloat16 channels_last'."""
    jpeg: bool = True
    """Also measure JPEG decoders: simplejpeg and torchvision, or Pillow if neither is installed."""
    avif: bool = False
    """Also measure AVIF of at most 4,096 bytes a patch of 256 px, decoded by Pillow."""
    pictures: Path | None = None
    """Folder of pictures whose patches are decoded. By default scikit-image's immunostain."""
    cores: int | None = None
    """Cores of the JPEG rows on several cores. By default all."""
    seconds: float = 3.0
    """Seconds of a measurement."""
    rounds: int = 3
    """Rounds in which everything is measured in turn; medians are reported."""
    out: Path | None = None
    """JSON file, written after every measurement: an interrupted run keeps its results."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.patch_size < 1 or min(self.batch_sizes or (1,)) < 1:
            raise ValueError("rounds, patch size and batch sizes are at least 1")
