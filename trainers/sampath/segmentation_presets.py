"""What segmentation runs are made with where nothing else is said, and what values of masks mean.

Mask values become labels: 0 for not labelled, then the classes from 1 on.

`bcss` and `crag` are the settings of SAM-Path (Zhang et al. 2023, cvlab-stonybrook/SAMPath at
369c195, configs/): steps are optimizer steps of its batches on one GPU, 12 x 2 and 6 images. Label
0 is "not labelled" here as there; CRAG's mask values 0 and 1 become the labels 1 and 2 for it.
"""
# n masks, K labels with 0, H W pixels

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from latentds_trainers.engine.settings import check_ranges, check_schedule

from latentds.errors import InputError

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
            if (found == FOREIGN).any():
                raise self.foreign(source, np.unique(mask).tolist())
        return labels

    def foreign(self, source: str, values: list[int]) -> InputError:
        """The error of a mask with values that stand for nothing."""
        unknown = [value for value in values if self.table[value] == FOREIGN]
        example = f"{self.text},{unknown[0]}:{IGNORE}"
        return InputError(
            f"{source}: its mask has the values {shown(values)}, and --mask-values {self.text} "
            f"does not say what {shown(unknown)} stands for; say it, for example "
            f"--mask-values {example}"
        )


def parse_mask_values(text: str, classes: tuple[str, ...]) -> MaskValues:
    """`0:ignore,255:nuclei` as a table.

    text     VALUE:CLASS, separated by commas; a class by name, or by number from 1 on
    raises   ValueError for what is not so written, a value said twice, or a class with no value
    """
    if not classes or len(set(classes)) < len(classes) or IGNORE in classes:
        raise ValueError(f"classes are {classes}; names, each once, none of them {IGNORE!r}")
    table = np.full(256, FOREIGN, np.uint8)
    for part in filter(None, (part.strip() for part in text.split(","))):
        value, colon, name = (word.strip() for word in part.partition(":"))
        if not colon or not value.isdecimal() or int(value) > 255:
            raise ValueError(f"mask_values {text!r}: {part!r} is not VALUE:CLASS, 0 to 255")
        if table[int(value)] != FOREIGN:
            raise ValueError(f"mask_values {text!r}: the value {value} is there twice")
        table[int(value)] = label_of(name, classes, text)
    missing = [name for label, name in enumerate(classes, 1) if label not in table]
    if missing:
        raise ValueError(f"mask_values {text!r}: no value stands for {', '.join(missing)}")
    return MaskValues(text, classes, table)


def label_of(name: str, classes: tuple[str, ...], text: str) -> int:
    if name == IGNORE:
        return UNLABELLED
    if name in classes:
        return classes.index(name) + 1
    if name.isdecimal() and 1 <= int(name) <= len(classes):
        return int(name)
    raise ValueError(
        f"mask_values {text!r}: no class {name!r}; there are {', '.join(classes)}, numbered from "
        f"1, and {IGNORE!r}"
    )


def shown(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (" ..." if len(values) > 8 else "")


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


def schedule_notes(
    preset: str, settings: SegmentationSettings, steps: Sequence[int], ranks: int
) -> list[str]:
    """Where the training departs from the schedule it is set to.

    steps  of every fold
    """
    notes, taken, meant = [], settings.images * ranks, PRESETS[preset].images
    if preset in SIZES_PX and taken != meant:
        notes.append(
            f"a step takes {taken} images (batch size x accumulation x {ranks} ranks), those of "
            f"preset {preset} {meant}: warm-up, milestones and learning rate are for the latter"
        )
    missed = [place for place in settings.milestones if place >= min(steps)]
    if settings.schedule == "multistep" and missed:
        notes.append(
            f"training ends after {min(steps)} steps, before the milestones {missed}: the learning "
            "rate does not fall there"
        )
    return notes
