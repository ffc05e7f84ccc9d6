"""Settings of sampath, and what values of masks mean. Its `--help` is built from this.

Mask values become labels: 0 for not labelled, then the classes from 1 on.

`bcss` and `crag` are the settings of SAM-Path (Zhang et al. 2023, cvlab-stonybrook/SAMPath at
369c195, configs/): steps are optimizer steps of its batches on one GPU, 12 x 2 and 6 images. Label
0 is "not labelled" here as there; CRAG's mask values 0 and 1 become the labels 1 and 2 for it.
"""
# n masks, K labels with 0, H W pixels

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
from latentds_trainers.engine.settings import (
    EngineOptions,
    TrainConfig,
    check_ranges,
    check_schedule,
    plain,
    settled,
)

from latentds.errors import InputError
from latentds.evaluation.patchsets.patch_set import PatchInput

SCHEDULE = ("batch_size", "accumulation", "lr", "warmup_steps", "schedule", "milestones")
IGNORE = "ignore"
UNLABELLED = 0
FOREIGN = 255  # in the table: a value that no class is given for


@dataclasses.dataclass(frozen=True, eq=False)
class MaskValues:
    """What the values of masks mean.

    text     as it was given, for messages
    classes  names of the labels 1 .. K - 1
    table    uint8 (256,): label of a value, FOREIGN for none
    """

    text: str
    classes: tuple[str, ...]
    table: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels 0 .. K - 1."""
        return ("unlabelled", *self.classes)

    def labels(self, masks: np.ndarray, sources: list[str]) -> np.ndarray:
        """Labels uint8 (n, H, W) of masks uint8 (n, H, W).

        sources  the masks' files, for messages
        raises   InputError that names the file, the values seen and what to do
        """
        labels: np.ndarray = self.table[masks]
        for source, mask, found in zip(sources, masks, labels, strict=True):
            unknown = np.unique(mask[found == FOREIGN]).tolist()
            if unknown:
                raise InputError(
                    f"{source}: its mask has the values {np.unique(mask).tolist()[:8]}, and "
                    f"--mask-values {self.text} does not say what {unknown[:8]} stand for; say it, "
                    f"for example --mask-values {self.text},{unknown[0]}:{IGNORE}"
                )
        return labels


def parse_mask_values(text: str, classes: tuple[str, ...]) -> MaskValues:
    """`0:ignore,255:nuclei` as a table.

    text     VALUE:CLASS, separated by commas; a class by name, or by number from 1 on
    raises   ValueError for what is not so written, a value said twice, or a class with no value
    """
    if not classes or len(set(classes)) < len(classes) or IGNORE in classes:
        raise ValueError(f"classes are {classes}; names, each once, none of them {IGNORE!r}")
    table = np.full(256, FOREIGN, np.uint8)
    labels = {str(label): label for label, _ in enumerate(classes, 1)}
    labels |= {name: label for label, name in enumerate(classes, 1)} | {IGNORE: UNLABELLED}
    for part in filter(None, (part.strip() for part in text.split(","))):
        value, colon, name = (word.strip() for word in part.partition(":"))
        if not colon or not value.isdecimal() or int(value) > 255:
            raise ValueError(f"mask_values {text!r}: {part!r} is not VALUE:CLASS, 0 to 255")
        if table[int(value)] != FOREIGN:
            raise ValueError(f"mask_values {text!r}: the value {value} is there twice")
        if name not in labels:
            raise ValueError(
                f"mask_values {text!r}: no class {name!r}; there are {', '.join(classes)}, "
                f"numbered from 1, and {IGNORE!r}"
            )
        table[int(value)] = labels[name]
    missing = [name for label, name in enumerate(classes, 1) if label not in table]
    if missing:
        raise ValueError(f"mask_values {text!r}: no value stands for {', '.join(missing)}")
    return MaskValues(text, classes, table)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationSettings:
    """Settings that a preset has and any of which may be given instead; see `SampathConfig`.

    raises  ValueError for counts, shares and weights that make no sense, and classes that are none
    """

    classes: tuple[str, ...]
    mask_values: str
    unscored: tuple[str, ...]
    image_size: int
    odd_size: Literal["pad", "resize"]
    epochs: int
    batch_size: int
    accumulation: int
    lr: float
    weight_decay: float = 1e-2
    warmup_steps: int
    schedule: Literal["constant", "cosine", "multistep"]
    milestones: tuple[int, ...] = ()
    dice_weight: float = 0.75
    focal_weight: float = 0.25
    ce_weight: float = 0.0
    iou_weight: float = 0.0625
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.75
    turn: float = 0.5
    jitter: float = 0.1

    def __post_init__(self) -> None:
        check_schedule(self)
        least, shares = {"epochs": 1, "image_size": 32}, ("flip", "turn")
        check_ranges(self, least, not_negative=("weight_decay",), shares=shares)
        if not 0 <= self.jitter <= 0.5:
            raise ValueError(f"jitter is {self.jitter}; from 0 to 0.5")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop_scale is {self.crop_scale}; two shares above 0, the lower first"
            )
        self.check_classes()

    def check_classes(self) -> None:
        """Refuse unscored classes that are none or all, and losses that have no weight."""
        known = self.values.classes  # refuses what it cannot read
        foreign = [name for name in self.unscored if name not in known]
        if foreign or len(self.unscored) >= len(known):
            raise ValueError(
                f"unscored is {self.unscored}; some of the classes {', '.join(known)}, not all"
            )
        weights = self.loss_weights
        if min(weights.values()) < 0 or not any(w for name, w in weights.items() if name != "iou"):
            raise ValueError(f"weights are {weights}; none below 0, of dice, focal, ce one above")

    @property
    def loss_weights(self) -> dict[str, float]:
        return {name: getattr(self, f"{name}_weight") for name in ("dice", "focal", "iou", "ce")}

    @property
    def values(self) -> MaskValues:
        return parse_mask_values(self.mask_values, self.classes)

    @property
    def left_out(self) -> tuple[int, ...]:
        names = self.values.names
        return (0, *(names.index(name) for name in self.unscored))

    @property
    def images(self) -> int:
        """Images that an optimizer step takes on one rank."""
        return self.batch_size * self.accumulation


PRESETS = {
    "bcss": SegmentationSettings(
        classes=("tumor", "stroma", "inflammatory", "necrosis", "other"),
        mask_values="0:ignore,1:tumor,2:stroma,3:inflammatory,4:necrosis,5:other",
        unscored=(), image_size=1024, odd_size="resize",
        epochs=32, batch_size=12, accumulation=2, lr=1e-4,
        warmup_steps=72, schedule="multistep", milestones=(1800, 2088),
    ),
    "crag": SegmentationSettings(
        classes=("background", "gland"),
        mask_values="0:background,1:gland",
        unscored=("background",), image_size=1536, odd_size="resize",
        epochs=60, batch_size=6, accumulation=1, lr=1e-4,
        warmup_steps=46, schedule="multistep", milestones=(1150, 1265),
        dice_weight=0.875, focal_weight=0.125, iou_weight=0.0,
    ),
    "binary": SegmentationSettings(  # nuclei and the like; no published run
        classes=("background", "foreground"),
        mask_values="0:background,255:foreground",
        unscored=("background",), image_size=256, odd_size="pad",
        epochs=60, batch_size=4, accumulation=1, lr=1e-3, warmup_steps=10, schedule="cosine",
    ),
}  # fmt: skip

# (H, W) of the images that a preset is for: CRAG's own, either way round, and as SAM-Path has them.
SIZES_PX: dict[str, tuple[tuple[int, int], ...]] = {
    "bcss": ((1024, 1024),),
    "crag": ((1512, 1516), (1516, 1512), (1536, 1536)),
}


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
    feature map (uni, phikon-v2, timm:NAME, ...)."""
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
        return plain(self) | plain(self.settings)
