"""Train `tiny`, the autoencoder that ships with latentds.

    python -m latentds_trainers.train_tiny --tiles ../shared/assets --out runs/tiny

Learns from openly licensed tiles only: `segmentation/dsb2018_he` (CC0),
`classification/oral_cc0_jpeg` (CC0), `tiles/tcga_gbm` (TCGA open access) and the slide in `wsi/`
(CC0). UCSB and MoNuSeg stay test sets and are never opened here. The same command goes on from the
newest checkpoint; at the end it writes the fp16 weights as safetensors with the figures of the
run, and the codebook fitted to their latents. Under `deepspeed` or `torchrun`, any number of ranks
draws the same crops.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from latentds_trainers.launching import launch
from latentds_trainers.settings import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTinyConfig(TrainConfig):
    """Settings of the run; the weights that ship were made with these."""

    tiles: Path
    """Folder with segmentation/, classification/, tiles/ and wsi/ as described above."""
    steps: int = 20_000
    batch_size: int = 12
    crop_px: int = 96
    lr: float = 3e-4
    """Peak learning rate; at 4e-4 with plain initialization the latents saturated at step 4,500."""
    warmup_steps: int = 500
    schedule: Literal["constant", "cosine"] = "cosine"
    clip: float | None = 0.3
    spike: float | None = 10.0
    """Leave out a step whose gradient norm is beyond this many times `clip`: a bad batch may not
    push the latents into tanh's flat ends."""
    precision: Literal["fp32", "autocast", "bf16"] = "autocast"
    half_scale_share: float = 0.25
    """Share of the crops that are taken at half resolution (area filter)."""
    stain_share: float = 0.5
    """Share of the crops whose colours are mixed, so that stains other than H&E are not foreign."""


def train(config: TrainTinyConfig) -> None:
    """Run to the last step; prints the weights' path."""
    from latentds_trainers.tiny_task import TinyTask

    path = TinyTask(config).run()
    if path is not None:
        print(path)


if __name__ == "__main__":
    launch(train, TrainTinyConfig, __doc__)
