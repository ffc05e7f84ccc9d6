"""Settings of train_codec. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import TrainConfig

USUAL_BYTES, USUAL_RATE_WEIGHT = 4096, 2.2e-3  # what this weight came to in a first run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSettings(TrainConfig):
    """Settings of the run. The defaults are for a CPU, and made the weights that ship."""

    tiles: Path
    """The assets' folder (segmentation/, classification/, tiles/, tiles_open/, wsi/), any folder of
    pictures of 256 px or more (every twentieth is held out), or a file of `--pack`."""
    pack: Path | None = None
    """Write as many tiles as fit into this file, at most 54 MB, and end."""
    students_of: str | None = None
    """Train only fast decoders, for the latents of this codec (a name or a folder). They learn from
    the codec's own decoder, and OUT/codec has nothing else."""
    name: str | None = None
    """Name of the autoencoder; by default that of the run's folder."""
    licence: str = "unknown"
    """Licence of the weights."""
    channels: int = 32
    bytes: int = USUAL_BYTES
    """Size of a 256 px patch at step 1, from which the rate's weight follows."""
    rate_weight: float | None = None
    """Weight of bits a pixel beside the mean squared error; by default it follows from `bytes`."""
    early_rate_weight: float = 5e-4
    """Weight of the rate in the first eighth of the steps, which keeps channels that start
    cheap."""
    rate_lr: float = 4e-3
    """Peak learning rate of the rate's mixtures, which have to follow the latents."""
    step_range: tuple[float, float] = (0.7, 2.8)
    """Smallest and largest quantization step of the crops, evenly distributed in logarithm: about
    4.5 to 1.4 KB."""
    crop_px: int = 96
    half_scale_share: float = 0.25
    """Share of the crops at half resolution (area filter)."""
    stain_share: float = 0.3
    """Share of the crops with mixed colours, to prepare for stains other than H&E."""
    encoder_widths: tuple[int, int] = (96, 160)
    """Channels at a quarter and an eighth of the resolution; the decoder is always `tiny`'s."""
    init: Literal["tiny-v1", "cold"] = "tiny-v1"
    """Start from the layers of `tiny-v1`, or from random ones."""
    steps: int = 8_000
    batch_size: int = 6
    lr: float = 4e-4
    warmup_steps: int = 200
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    clip: float | None = 0.3
    spike: float | None = 10.0
    save_every: int = 800
    sample_every: int | None = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate_weight is None:
            # Error falls as 1 / bytes, so its slope, which the weight has to match, as its square.
            weight = USUAL_RATE_WEIGHT * (USUAL_BYTES / self.bytes) ** 2
            object.__setattr__(self, "rate_weight", weight)
