"""What a segmentation run sees: its folds, and crops of images with labels, or images whole."""
# B images of a forward pass, H W pixels of a patch, h w of what the network sees, K labels with 0

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from latentds_trainers.sampath.config import SegmentationSettings
from PIL import Image, ImageDraw
from torch import Tensor

from latentds.core.randomness import key_of, patch_seeds, shuffled, uniform
from latentds.core.storage import write_atomically
from latentds.errors import InputError, missing_extra
from latentds.evaluation.folds import Fold, check_disjoint, predefined_fold
from latentds.sources.csv_tables import read_table
from latentds.sources.names import split_of_fold
from latentds.sources.slide_names import NameIndex, some
from latentds.views.mask_geometry import random_views, whole

if TYPE_CHECKING:
    from latentds.evaluation.patchsets.patches import PatchSet

JITTERED = 0.5  # share of the crops whose colours change: albumentations' default
COUNTED_AT_ONCE = 16
CHANGES = ("brightness", "contrast", "saturation", "hue")
COLOURS = (  # of the labels 1, 2, ...; told apart by colour-blind readers too (Okabe and Ito 2008)
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
GAP_PX, LEGEND_PX = 8, 20
NO_FOLDS = (
    "say what is tested: --folds N for a cross-validation, --fold-table CSV, or data with splits "
    "train and test"
)


class LabelledImages:
    """Decoded images and the labels of their masks, by row of the patch set."""

    def __init__(self, settings: SegmentationSettings, patches: PatchSet) -> None:
        self.settings, self.patches, self.values = settings, patches, settings.values
        self.sources = patches.table.sources

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W); InputError for values that stand for nothing."""
        sources = [self.sources[row] for row in rows.tolist()]
        return self.values.labels(self.patches.masks(rows), sources)

    def count_pixels(self) -> tuple[np.ndarray, str]:
        """int64 (N, K): pixels of every image by label; and a hash of all labels, 16 hex digits.

        Reads and checks every mask.
        """
        size, counts, hashed = len(self.values.names), [], hashlib.sha256()
        for start in range(0, len(self.patches), COUNTED_AT_ONCE):
            rows = np.arange(start, min(start + COUNTED_AT_ONCE, len(self.patches)))
            for labels in self.labels(rows):
                counts.append(np.bincount(labels.ravel(), minlength=size))
                hashed.update(labels.tobytes())
        return np.stack(counts), hashed.hexdigest()[:16]

    def crops(self, images: Tensor, rows: np.ndarray, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Random views of images uint8 (B, 3, H, W): float (B, 3, h, w), labels uint8 (B, h, w)."""
        settings, edge = self.settings, self.settings.image_size
        views = random_views(
            seeds,
            (int(images.shape[-2]), int(images.shape[-1])),
            (edge, edge),
            scale=settings.crop_scale,
            flip=settings.flip,
            turn=settings.turn,
        )
        labels = torch.from_numpy(self.labels(rows)).to(images.device)
        seen = torch.stack([view.image(image) for view, image in zip(views, images, strict=True)])
        masks = torch.stack([view.mask(mask) for view, mask in zip(views, labels, strict=True)])
        return jitter(seen, seeds, settings.jitter), masks

    def whole(self, rows: np.ndarray) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Row, image float (1, 3, h, w) and labels uint8 (h, w), one after the other.

        Resized where the config says so, else of the patch's own size.
        """
        edge = self.settings.image_size
        stream = self.patches.stream(np.array([row]) for row in rows)
        for row, image in zip(rows.tolist(), stream, strict=True):
            labels = torch.from_numpy(self.labels(np.array([row]))[0]).to(image.device)
            size = (int(image.shape[-2]), int(image.shape[-1]))
            view = whole(size, (edge, edge) if self.settings.odd_size == "resize" else size)
            yield row, view.image(image[0])[None], view.mask(labels)


def draw_crops(rows: np.ndarray, seed: int, places: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Which image is at places of the training's long row of images, and by which seed it is cut.

    Every epoch is a permutation of `rows`; a place's draw follows from (seed, place) alone.

    places   int64 (B,), counted from the first step on
    returns  rows int64 (B,) and seeds int64 (B,)
    """
    epochs, within = np.divmod(places, len(rows))
    chosen = np.empty_like(places)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        chosen[here] = rows[epoch_order(len(rows), seed, epoch)[within[here]]]
    seeds = patch_seeds(seed, epochs, np.zeros_like(epochs), chosen)
    return chosen, torch.from_numpy(seeds)


@functools.lru_cache(maxsize=2)
def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    return shuffled(images, key_of("images", seed, epoch))


def jitter(images: Tensor, seeds: Tensor, strength: float) -> Tensor:
    """Half of the images (B, 3, h, w) in [0, 1] with other brightness, contrast, saturation, hue.

    strength  factors are drawn from 1 - strength to 1 + strength, hue's shift from -strength to
              strength of a turn; in a random order
    """
    if not strength:
        return images
    draws = uniform(seeds, "jitter", len(CHANGES) + 2).tolist()
    return torch.stack(
        [
            recoloured(image, numbers, strength) if numbers[-1] < JITTERED else image
            for image, numbers in zip(images, draws, strict=True)
        ]
    )


def recoloured(image: Tensor, draws: list[float], strength: float) -> Tensor:
    """One image (3, h, w) with its colours changed by numbers in [0, 1)."""
    try:
        from torchvision.transforms import functional
    except ImportError as error:
        raise missing_extra("torchvision", "evaluate") from error
    for place in shuffled(len(CHANGES), int(draws[len(CHANGES)] * (1 << 24))).tolist():
        name, shift = CHANGES[place], (2 * draws[place] - 1) * strength
        change = getattr(functional, f"adjust_{name}")
        image = change(image, shift if name == "hue" else 1 + shift)
    return image


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class FoldPlan:
    """The folds of a run.

    rule   how they were found, in words
    notes  what a reader of the scores should know
    """

    folds: list[Fold]
    rule: str
    notes: tuple[str, ...] = ()


def table_plan(
    path: Path, sources: Sequence[str], groups: Sequence[str], *, allow_shared: bool = False
) -> FoldPlan:
    """The one fold of a table img_id, fold: -1 is test, 0 val, others train (SAM-Path's).

    raises  InputError for images of the table that are not there, and the reverse; for what
            `named_plan` refuses
    """
    table = read_table(path)
    image, fold = (table.need_column([name], f"{name} of an image") for name in ("img_id", "fold"))
    known = list(dict.fromkeys(sources))
    matched = NameIndex(known).match(table.values(image), str(path))
    splits = {
        known[place]: split_of_fold(value, path)
        for name, value in zip(table.values(image), table.values(fold), strict=True)
        if (place := matched[name]) is not None
    }
    lost = [name for name, place in matched.items() if place is None]
    missing = [source for source in known if source not in splits]
    for left, what in ((lost, "of its images are not in the data"), (missing, "images it lacks")):
        if left:
            raise InputError(
                f"{path}: {len(left):,} {what}: {some(left)}; every image needs a line, and every "
                "line an image"
            )
    named, rule = [splits[source] for source in sources], f"fold table {path.name}"
    return named_plan(named, groups, rule, allow_shared=allow_shared)


def named_plan(
    splits: Sequence[str], groups: Sequence[str], rule: str, *, allow_shared: bool = False
) -> FoldPlan:
    """The one fold that split names say, with notes on groups in two of its parts.

    allow_shared  take groups that are tested and in another part as well
    raises        InputError for such groups otherwise, and as `predefined_fold` does. Train and val
                  may share groups: scores are those of test, with the weights of the last step
    """
    fold = predefined_fold(splits)
    notes = []
    for one, other in (("train", "test"), ("val", "test"), ("train", "val")):
        parts = [{groups[row] for row in fold.parts()[part].tolist()} for part in (one, other)]
        shared = sorted(parts[0] & parts[1])
        if not shared:
            continue
        told = f"{len(shared):,} groups are in both {one} and {other}"
        if other == "test" and not allow_shared:
            raise InputError(
                f"{rule}: {told}: {some(shared)}. A patient has to be on one side; mend the "
                "splits or --groups, or take them as they are with --allow-shared-groups"
            )
        notes.append(told)
    return FoldPlan(folds=[fold], rule=rule, notes=tuple(notes))


def group_plan(groups: Sequence[str], folds: int, seed: int, rule: str) -> FoldPlan:
    """Folds of about as many images each that keep groups whole; nothing is left for validation.

    raises  InputError for fewer groups than folds
    """
    counts = Counter(groups)
    if len(counts) < folds:
        raise InputError(
            f"{len(counts)} groups of images ({rule}) for {folds} folds; take fewer folds"
        )
    order = sorted(counts, key=lambda name: (-counts[name], key_of("fold", seed, name)))
    filled, place = [0] * folds, {}
    for name in order:
        place[name] = filled.index(min(filled))
        filled[place[name]] += counts[name]
    places = np.array([place[name] for name in groups])
    none = np.empty(0, np.int64)
    made = [
        Fold(np.flatnonzero(places != number), none, np.flatnonzero(places == number))
        for number in range(folds)
    ]
    check_disjoint(made, groups)
    return FoldPlan(folds=made, rule=f"{folds} folds, groups kept whole: {rule}")


def check_classes(plan: FoldPlan, counts: np.ndarray, names: Sequence[str]) -> tuple[str, ...]:
    """Notes on classes that a fold lacks.

    counts  int64 (N, K), pixels of every image by label
    raises  InputError for a class that is tested and not trained on, or that no image has
    """
    absent = [name for name, pixels in zip(names, counts.sum(0), strict=True) if not pixels]
    if lacking := [name for name in absent if name != names[0]]:
        raise InputError(f"no mask has a pixel of {some(lacking)}; see --classes and --mask-values")
    notes = []
    for number, fold in enumerate(plan.folds):
        has = {part: counts[rows].sum(0) > 0 for part, rows in fold.parts().items()}
        for label in range(1, len(names)):
            if has["test"][label] and not has["train"][label]:
                rows = fold.test[counts[fold.test, label] > 0]
                raise InputError(
                    f"fold {number}: class {names[label]!r} is in {len(rows)} images, all tested "
                    "and none trained on; take other folds, finer groups, or leave the class out"
                )
            if not has["test"][label]:
                notes.append(f"fold {number} tests no pixel of class {names[label]!r}")
    return tuple(notes)


def write_picture(
    path: Path,
    image: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    settings: SegmentationSettings,
) -> None:
    """A PNG: the image, and twice the image under half transparent labels, with a line of names.

    image              uint8 (h, w, 3)
    truth, prediction  labels uint8 (h, w): 0 not labelled, then the classes
    """
    palette, is_shown = np.zeros((256, 3), np.uint16), np.zeros((256, 1), bool)
    height, width = image.shape[:2]
    sheet = Image.new("RGB", (3 * width + 2 * GAP_PX, height + LEGEND_PX), "white")
    draw, top, right = ImageDraw.Draw(sheet), height + 3, 3 * width + 2 * GAP_PX
    for label, name in reversed([*enumerate(settings.classes, 1)]):
        if name not in settings.unscored:
            palette[label], is_shown[label] = COLOURS[(label - 1) % len(COLOURS)], True
            right -= 12 + int(draw.textlength(name))
            draw.text((right, top), name, fill=tuple(palette[label].tolist()))
    parts = {"image": image}
    for name, labels in (("truth", truth), ("prediction", prediction)):
        mixed = (image + palette[labels]) // 2
        parts[name] = np.where(is_shown[labels], mixed, image).astype(np.uint8)
    for number, (name, part) in enumerate(parts.items()):
        left = number * (width + GAP_PX)
        sheet.paste(Image.fromarray(part), (left, 0))
        draw.text((left + 2, top), name, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
