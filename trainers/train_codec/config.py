"""Settings of train_codec. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

from latentds_trainers.engine.settings import EngineOptions, TrainConfig, settled

USUAL_BYTES, USUAL_RATE_WEIGHT = 4096, 1.1e-3  # the slope of error over bits there


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecPreset:
    """Settings that a preset has and any of which may be given instead; see `TrainCodecConfig`."""

    steps: int
    batch_size: int
    crop_px: int
    precision: Literal["fp32", "autocast", "bf16"]
    encoder_widths: tuple[int, int]
    init: str
    save_every: int
    save_minutes: float | None = None
    warmup_steps: int


PRESETS = {
    # One core of an EPYC without AVX-512: 0.6 s a step. bf16 is 13 times slower there than fp32.
    "cpu": CodecPreset(
        steps=8_000, batch_size=6, crop_px=96, precision="fp32", encoder_widths=(96, 160),
        init="tiny-v2", save_every=800, warmup_steps=200,
    ),
    "gpu-10min": CodecPreset(
        steps=12_000, batch_size=64, crop_px=128, precision="autocast", encoder_widths=(192, 320),
        init="cold", save_every=100_000, save_minutes=2.0, warmup_steps=500,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecOptions:
    """Settings of the run that stay as they are given."""

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
    preset: Literal["cpu", "gpu-10min"] = "cpu"
    """Sizes for two cores and at most two hours, or for one H100-class GPU and ten minutes."""
    channels: int = 32
    bytes: int = USUAL_BYTES
    """Size that a 256 px patch is to have, from which the rate's weight follows."""
    early_rate_weight: float = 2e-4
    """Weight of the rate in the first eighth of the steps, which keeps channels that start
    cheap."""
    rate_lr: float = 4e-3
    """Peak learning rate of the rate's mixtures, which have to follow the latents."""
    step_range: tuple[float, float] = (0.4, 2.8)
    """Smallest and largest quantization step of the crops, evenly distributed in logarithm: about
    10 to 2 KB."""
    half_scale_share: float = 0.25
    """Share of the crops at half resolution (area filter)."""
    stain_share: float = 0.3
    """Share of the crops with mixed colours, to prepare for stains other than H&E."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSettings(CodecOptions, CodecPreset, TrainConfig):
    """The settings with nothing left open: what the engine and its checkpoints have."""

    rate_weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCodecConfig(CodecOptions, EngineOptions):
    """Settings of the run; None is the preset's. The weights that ship: preset `cpu`."""

    rate_weight: float | None = None
    """Weight of bits a pixel beside the mean squared error at step 1, elsewhere times the square of
    the step; by default it follows from `bytes`."""
    steps: int | None = None
    batch_size: int | None = None
    crop_px: int | None = None
    encoder_widths: tuple[int, int] | None = None
    """Channels at a quarter and an eighth of the resolution; the decoder is always `tiny`'s."""
    init: str | None = None
    """Go on from a codec (`tiny-v2`, or a run's OUT/codec), of which channels that are always zero
    begin anew; or `cold`, from random weights."""
    lr: float = 4e-4
    warmup_steps: int | None = None
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    clip: float | None = 0.3
    spike: float | None = 10.0
    precision: Literal["fp32", "autocast", "bf16"] | None = None  # type: ignore[assignment]
    save_every: int | None = None  # type: ignore[assignment]
    sample_every: int | None = 1000
    accumulation: int = 1
    """Forward passes whose gradients are averaged into one optimizer step."""

    def __post_init__(self) -> None:
        _ = self.settings  # refuses what cannot be

    @functools.cached_property
    def settings(self) -> CodecSettings:
        """The preset, with what is given instead."""
        given = vars(self) | vars(settled(PRESETS[self.preset], self))
        if self.rate_weight is None:
            # Error falls as 1 / bytes, so its slope, which the weight has to match, as its square.
            given["rate_weight"] = USUAL_RATE_WEIGHT * (USUAL_BYTES / self.bytes) ** 2
        return CodecSettings(**given)
