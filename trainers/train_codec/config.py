"""Settings of train_codec. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from latentds_trainers.engine.settings import TrainConfig

PRESETS: dict[str, dict[str, Any]] = {
    # One core of an EPYC without AVX-512: 0.6 s a step. bf16 is 13 times slower there than fp32.
    "cpu": {
        "steps": 8_000, "batch_size": 6, "crop_px": 96, "precision": "fp32",
        "encoder_widths": (96, 160), "init": "tiny-v1", "save_every": 800, "warmup_steps": 200,
        "save_minutes": None,
    },
    "gpu-10min": {
        "steps": 12_000, "batch_size": 64, "crop_px": 128, "precision": "autocast",
        "encoder_widths": (192, 320), "init": "cold", "save_every": 100_000, "warmup_steps": 500,
        "save_minutes": 2.0,
    },
}  # fmt: skip
USUAL_BYTES, USUAL_RATE_WEIGHT = 4096, 2.2e-3  # what this weight came to in a first run


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCodecConfig(TrainConfig):
    """Settings of the run; None is the preset's. The weights that ship: preset `cpu`."""

    tiles: Path
    """The assets' folder (segmentation/, classification/, tiles/, tiles_open/, wsi/), any folder of
    PNG and JPEG pictures of 256 px or more (every twentieth is judged by), or a file that `--pack`
    wrote."""
    pack: Path | None = None
    """Write what fits of the tiles into this file, at most 55 MB, and end."""
    name: str | None = None
    """Of the autoencoder; by default the run's folder's."""
    licence: str = "unknown"
    """Of the weights."""
    preset: Literal["cpu", "gpu-10min"] = "cpu"
    """Sizes for two cores and at most two hours, or for one H100-class GPU and ten minutes."""
    channels: int = 32
    bytes: int = USUAL_BYTES
    """Size of a 256 px patch at step 1 that the rate's weight is chosen for."""
    rate_weight: float | None = None
    """Of bits a pixel beside the mean squared error; follows from `bytes`."""
    early_rate_weight: float = 5e-4
    """The weight for the first eighth of the steps: channels that start cheap are kept."""
    steps: int | None = None
    batch_size: int | None = None
    crop_px: int | None = None
    encoder_widths: tuple[int, int] | None = None
    """Channels at a quarter and an eighth of the resolution; the decoder is always `tiny`'s."""
    init: Literal["tiny-v1", "cold"] | None = None
    """Start from the layers of `tiny-v1`, or from random ones."""
    lr: float = 4e-4
    rate_lr: float = 4e-3
    """Peak learning rate of the rate's mixtures, which have to follow the latents."""
    warmup_steps: int | None = None
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    clip: float | None = 0.3
    spike: float | None = 10.0
    """Leave out a step whose gradient norm is beyond this many times `clip`."""
    precision: Literal["fp32", "autocast", "bf16"] | None = None
    save_every: int | None = None
    sample_every: int | None = 1000
    step_range: tuple[float, float] = (0.7, 2.8)
    """Quantization steps that the crops take, evenly in their logarithm: about 4.5 to 1.4 KB."""
    half_scale_share: float = 0.25
    """Share of the crops that are taken at half resolution (area filter)."""
    stain_share: float = 0.3
    """Share of the crops whose colours are mixed, so that stains other than H&E are not foreign."""

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.rate_weight is None:
            # Error falls as 1 / bytes, so its slope, which the weight has to match, as its square.
            weight = USUAL_RATE_WEIGHT * (USUAL_BYTES / self.bytes) ** 2
            object.__setattr__(self, "rate_weight", weight)
        super().__post_init__()
