"""What segmentation runs are made with where nothing else is said.

`bcss` and `crag` are the settings of SAM-Path (Zhang et al. 2023, cvlab-stonybrook/SAMPath at
369c195, configs/): steps are optimizer steps of its batches on one GPU, 12 x 2 and 6 images. Label
0 is "not labelled" here as there; CRAG's mask values 0 and 1 become the labels 1 and 2 for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentds_trainers.sampath.config import SampathConfig

AUGMENTATION: dict[str, Any] = {
    "crop_scale": (0.08, 1.0), "flip": 0.75, "turn": 0.5, "jitter": 0.1,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "bcss": {
        "classes": ("tumor", "stroma", "inflammatory", "necrosis", "other"),
        "mask_values": "0:ignore,1:tumor,2:stroma,3:inflammatory,4:necrosis,5:other",
        "unscored": (), "image_size": 1024, "odd_size": "resize",
        "epochs": 32, "batch_size": 12, "accumulation": 2, "lr": 1e-4, "weight_decay": 1e-2,
        "warmup_steps": 72, "schedule": "multistep", "milestones": (1800, 2088),
        "dice_weight": 0.75, "focal_weight": 0.25, "ce_weight": 0.0, "iou_weight": 0.0625,
    } | AUGMENTATION,
    "crag": {
        "classes": ("background", "gland"),
        "mask_values": "0:background,1:gland",
        "unscored": ("background",), "image_size": 1536, "odd_size": "resize",
        "epochs": 60, "batch_size": 6, "accumulation": 1, "lr": 1e-4, "weight_decay": 1e-2,
        "warmup_steps": 46, "schedule": "multistep", "milestones": (1150, 1265),
        "dice_weight": 0.875, "focal_weight": 0.125, "ce_weight": 0.0, "iou_weight": 0.0,
    } | AUGMENTATION,
    "binary": {  # nuclei and the like; no published run
        "classes": ("background", "foreground"),
        "mask_values": "0:background,255:foreground",
        "unscored": ("background",), "image_size": 256, "odd_size": "pad",
        "epochs": 60, "batch_size": 4, "accumulation": 1, "lr": 1e-3, "weight_decay": 1e-2,
        "warmup_steps": 10, "schedule": "cosine", "milestones": (),
        "dice_weight": 0.75, "focal_weight": 0.25, "ce_weight": 0.0, "iou_weight": 0.0625,
    } | AUGMENTATION,
}  # fmt: skip

# (H, W) of the images that a preset is for: CRAG's own, either way round, and as SAM-Path has them.
SIZES_PX: dict[str, tuple[tuple[int, int], ...]] = {
    "bcss": ((1024, 1024),),
    "crag": ((1512, 1516), (1516, 1512), (1536, 1536)),
}


def steps_of(config: SampathConfig, images: int, ranks: int) -> int:
    """Optimizer steps of a fold that trains on so many images."""
    epoch_steps = math.ceil(images / step_images(config, ranks))
    return config.steps or int(config.number("epochs")) * epoch_steps


def step_images(config: SampathConfig, ranks: int) -> int:
    """Images that an optimizer step takes."""
    return int(config.number("batch_size") * config.number("accumulation")) * ranks


def schedule_notes(config: SampathConfig, images: Sequence[int], ranks: int) -> list[str]:
    """Where the training departs from the schedule it is set to.

    images  what every fold trains on
    """
    notes, steps = [], min(steps_of(config, count, ranks) for count in images)
    preset, taken = PRESETS[config.preset], step_images(config, ranks)
    meant = preset["batch_size"] * preset["accumulation"]
    if config.preset in SIZES_PX and taken != meant:
        notes.append(
            f"a step takes {taken} images (batch size x accumulation x {ranks} ranks), those of "
            f"preset {config.preset} {meant}: warm-up, milestones and learning rate are for the "
            "latter"
        )
    missed = [place for place in config.milestones or () if place >= steps]
    if config.schedule == "multistep" and missed:
        notes.append(
            f"training ends after {steps} steps, before the milestones {missed}: the learning "
            "rate does not fall there"
        )
    return notes
