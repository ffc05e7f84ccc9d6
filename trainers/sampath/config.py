"""Settings of sampath. No heavy import: its `--help` is built from this."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

from latentds_trainers.engine.settings import (
    EngineOptions,
    TrainConfig,
    check_ranges,
    plain,
    settled,
)
from latentds_trainers.sampath.segmentation_presets import PRESETS, SegmentationSettings

from latentds.evaluation.patchsets.patch_set import PatchInput

SCHEDULE = ("batch_size", "accumulation", "lr", "warmup_steps", "schedule", "milestones")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampathConfig(PatchInput, EngineOptions):
    """Label every pixel: SAM-Path, or a plain U-Net.

    The preset sets the options that are not given; `settings` has them all.
    """

    preset: Literal["bcss", "crag", "binary"] = "binary"
    """bcss, crag: classes, sizes, losses, schedule and augmentation of SAM-Path on these sets.
    binary: foreground and background from masks of 0 and 255, 256 px crops, 60 epochs of batches of
    4, learning rate 1e-3 with a cosine."""
    model: Literal["sampath", "unet"] = "sampath"
    """sampath: SAM's mask decoder with class prompts on frozen encoders; unet: a U-Net from random
    weights, as a baseline."""
    sam: str = "facebook/sam-vit-base"
    """SAM: a name on the Hub, a folder with config.json and model.safetensors, NAME@FOLDER, or
    tiny-random for a quick try."""
    pathology_encoder: str | None = None
    """Encoder beside SAM's: hipt@FILE for HIPT's vit256_small_dino.pth, or an embedder with a
    feature map (uni, phikon-v2, nic:FILE, timm:NAME, ...)."""
    unet_encoder: str = "resnet18"
    """Encoder of --model unet, by its name in segmentation_models_pytorch."""
    unet_channels: tuple[int, ...] = (256, 128, 64, 32, 16)
    """Channels of each level of the U-Net's decoder, coarsest first."""
    classes: tuple[str, ...] | None = None
    """Names of the classes."""
    mask_values: str | None = None
    """Meaning of the values in masks: VALUE:CLASS by name or by number from 1 on, or VALUE:ignore,
    separated by commas, such as 0:ignore,255:nuclei. Other values are refused."""
    unscored: tuple[str, ...] | None = None
    """Classes that are predicted but count in no score, such as background."""
    image_size: int | None = None
    """Edge of the training squares in pixels."""
    odd_size: Literal["pad", "resize"] | None = None
    """Images that are no square of --image-size: pad keeps their pixels (autoencoders and the U-Net
    mirror the edges up to their multiple and cut back); resize brings images to that square, as
    SAM-Path does, originals before their codec."""
    fold_table: Path | None = None
    """CSV of img_id and fold (-1 test, 0 val, others train): one fold."""
    folds: int | None = None
    """Folds of a cross-validation that keeps groups together; by default, without --fold-table, the
    data's own splits train and test."""
    allow_shared_groups: bool = False
    """Permit a --fold-table or splits in which a tested group (a patient or slide, see --groups) is
    also trained or validated on."""
    seeds: tuple[int, ...] = ()
    """Train every fold once with each seed; --seed alone by default. Three are advised: the paper
    ran one."""
    seed: int = 0
    """Seed of the folds, and of the training without --seeds."""
    epochs: int | None = None
    """Passes over a fold's training images."""
    steps: int | None = None
    """Optimizer steps instead of --epochs."""
    batch_size: int | None = None
    """Images of a rank in one forward pass."""
    accumulation: int | None = None
    """Forward passes whose gradients are averaged into one optimizer step."""
    lr: float | None = None
    """Learning rate after the warm-up."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["constant", "cosine", "multistep"] | None = None
    """After the warm-up: constant, half a cosine to zero at the last step, or divided by 10 at each
    of the milestones."""
    milestones: tuple[int, ...] | None = None
    """Steps after which --schedule multistep divides the learning rate by ten."""
    dice_weight: float | None = None
    focal_weight: float | None = None
    iou_weight: float | None = None
    """Weight of the error of SAM's IoU prediction."""
    ce_weight: float | None = None
    """Weight of the cross entropy."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of an image's area in a training crop, before it is resized to
    --image-size."""
    flip: float | None = None
    """Share of the crops that are flipped, along one axis or both."""
    turn: float | None = None
    """Share of the crops that are turned by 0 to 3 right angles."""
    jitter: float | None = None
    """Strength of the change of brightness, contrast, saturation and hue in half of the crops."""
    pictures: int = 4
    """Tested images of every fold to draw with their true and predicted labels."""
    keep: int = 1
    """Newest checkpoints to keep of a fold."""
    json: bool = False
    """Print the result as JSON instead of tables."""

    def __post_init__(self) -> None:
        PatchInput.__post_init__(self)
        EngineOptions.__post_init__(self)
        check_ranges(self, {"pictures": 0, "folds": 2})
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}; each once")
        if self.fold_table is not None and self.folds is not None:
            raise ValueError("give --folds or --fold-table, not both")
        if self.precision == "bf16":
            raise ValueError("precision bf16: frozen encoders stay in float32; take autocast")
        if self.zero_stage == 3:
            raise ValueError("zero_stage 3 spreads weights that are small here; take 0, 1 or 2")
        self.of_fold(self.out, self.seed, 1 if self.steps is None else self.steps)  # refuses too

    @functools.cached_property
    def settings(self) -> SegmentationSettings:
        """The preset, with what is given instead."""
        preset = PRESETS[self.preset]
        if self.schedule is not None and self.schedule != "multistep":
            preset = dataclasses.replace(preset, schedule=self.schedule, milestones=())
        return settled(preset, self)

    def steps_of(self, images: int, ranks: int) -> int:
        """Optimizer steps of a fold that trains on so many images."""
        epoch_steps = math.ceil(images / (self.settings.images * ranks))
        return self.steps or self.settings.epochs * epoch_steps

    def of_fold(self, out: Path, seed: int, steps: int) -> TrainConfig:
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(EngineOptions)}
        schedule = {name: getattr(self.settings, name) for name in SCHEDULE}
        return TrainConfig(**options | schedule | {"out": out, "seed": seed, "steps": steps})

    def to_json(self) -> dict[str, Any]:
        """All settings, those of the preset filled in."""
        return plain(self) | plain(self.settings)
