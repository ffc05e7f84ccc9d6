"""Scores of label maps: the correct ones, and what SAM-Path's code reports under the same names.

Both are read off one table of pixel counts. The second kind is needed to compare with published
figures: SAM-Path's code (cvlab-stonybrook/SAMPath, metrics of torchmetrics 0.11.4 with num_classes
+ 1 and ignore_index 0) takes a class that is not scored for unlabelled pixels, and those metrics
then disagree about which of its pixels count. The formulas are re-implemented here.
"""
# K classes

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentds.errors import InputError, ShapeError

Counts = NDArray[np.int64]

RATIOS = ("dice", "jaccard", "f1", "recall", "precision")
SCORES = (
    "pixel_accuracy",
    *(f"{name}_{mean}" for name in RATIOS for mean in ("macro", "micro")),
)

COMPAT_REASON = (
    "sampath-compat is what SAM-Path's code reports with torchmetrics 0.11.4. It sets the class "
    "that is not scored (CRAG's background) to 0, the label of unlabelled pixels, in prediction "
    "and truth. F1 and IOU_Jaccard (both micro) then drop every pixel whose truth is 0, and with "
    "them all false positives on background: for one scored class both are its pixel recall. Dice "
    "drops the class but keeps those pixels, so it is right. Without such a class (BCSS), F1 is "
    "pixel accuracy and IOU_Jaccard is F1 / (2 - F1), both over labelled pixels. IOU_Jaccard_Bal "
    "counts empty classes as 0 and has one class too many."
)


class Confusion:
    """Numbers of pixels by true and predicted class, added up image by image.

    classes  names, in the order of the labels 0 .. K - 1
    counts   int64 (K, K): rows are the truth, columns the prediction
    """

    def __init__(self, classes: Sequence[str], counts: ArrayLike | None = None) -> None:
        self.classes = tuple(classes)
        size = len(self.classes)
        self.counts: Counts = np.zeros((size, size), np.int64)
        if counts is not None:
            self.counts += np.asarray(counts, np.int64)

    def add(self, prediction: ArrayLike, truth: ArrayLike, ignore: int | None = None) -> None:
        """Count label maps of one shape, such as (n, H, W) or (H, W), of any integer type.

        ignore  label of the truth whose pixels are not counted, such as 0 for unlabelled; it may
                lie outside the classes, as 255 often does
        raises  ShapeError for two shapes or values that are not integers; InputError for a label
                that no class has
        """
        predicted, true = np.asarray(prediction), np.asarray(truth)
        if predicted.shape != true.shape:
            raise ShapeError(f"prediction is {predicted.shape}, truth {true.shape}: not one shape")
        if predicted.dtype.kind not in "iub" or true.dtype.kind not in "iub":
            raise ShapeError(f"labels are integers, not {predicted.dtype} and {true.dtype}")
        if ignore is not None:
            kept = true != ignore
            predicted, true = predicted[kept], true[kept]
        size = len(self.classes)
        for name, labels in (("truth", true), ("prediction", predicted)):
            if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < size:
                seen = [int(label) for label in np.unique(labels) if not 0 <= label < size]
                raise InputError(
                    f"{name} holds labels {seen[:5]}; there are {size} classes, 0 to {size - 1}"
                )
        places = true.ravel().astype(np.int64) * size + predicted.ravel()
        self.counts += np.bincount(places, minlength=size * size).reshape(size, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentationScores:
    """Correct scores, each in [0, 1].

    scores     those of SCORES that are defined; no more than pixel_accuracy where no scored class
               has a pixel, in truth or prediction
    per_class  the same of each class that truth or prediction has, and its number of true pixels as
               `pixels`
    """

    scores: dict[str, float]
    per_class: dict[str, dict[str, float]]


def correct_scores(confusion: Confusion, left_out: Collection[int] = ()) -> SegmentationScores:
    """Macro and micro Dice, Jaccard, F1, recall and precision, and the accuracy of pixels.

    left_out  labels that are not scored, such as background: they have no row and count in no
              mean, but what is wrongly predicted on their pixels counts as false
    returns   macro means over the classes that truth or prediction has, each metric over those
              for which it is defined; a class predicted and never true has Dice 0. F1 is Dice by
              another name. `pixel_accuracy` is over all counted pixels, whatever is left out
    """
    hits, false, missed = outcomes(confusion.counts)
    found = np.flatnonzero(hits + false + missed)
    present = [label for label in found.tolist() if label not in left_out]
    per_class = {
        confusion.classes[label]: ratios(hits[label], false[label], missed[label])
        | {"pixels": float(hits[label] + missed[label])}
        for label in present
    }
    micro = ratios(hits[present].sum(), false[present].sum(), missed[present].sum())
    total = confusion.counts.sum()
    scores = {"pixel_accuracy": float(hits.sum() / total)} if total else {}
    for name in RATIOS:
        values = [row[name] for row in per_class.values() if name in row]
        if values:
            scores[f"{name}_macro"] = float(np.mean(values))
        if name in micro:
            scores[f"{name}_micro"] = micro[name]
    return SegmentationScores(scores=scores, per_class=per_class)


def sampath_compat_scores(
    confusion: Confusion, ignored_metric: int | None = None
) -> dict[str, float]:
    """What SAM-Path's code reports: IOU_Jaccard_Bal, IOU_Jaccard, F1, Dice, Dice_Bal.

    confusion       classes as SAM-Path numbers them, 0 being unlabelled; unlabelled pixels may be
                    counted or not: nothing here depends on them
    ignored_metric  the class it does not score: None for BCSS, 1 for CRAG, whose background is 1
    source          what predict_mask and get_metrics of cvlab-stonybrook/SAMPath at 369c195 and
                    torchmetrics 0.11.4 do; equal to the latter's figures within 1e-7
    """
    counts = confusion.counts.copy()
    counts[0] = 0  # where the truth is unlabelled, the prediction is set to unlabelled too
    if ignored_metric is not None:
        for table in (counts, counts.T):  # rows, then columns of the class become those of 0
            table[0] += table[ignored_metric]
            table[ignored_metric] = 0
    labelled = counts.copy()
    labelled[0] = 0  # ignore_index 0, as JaccardIndex and F1Score mean it
    hits, false, missed = outcomes(labelled)
    unions, total = hits + false + missed, labelled.sum()
    # The legacy Dice drops class 0 and keeps its pixels.
    dice_hits, dice_false, dice_missed = (values[1:] for values in outcomes(counts))
    areas = 2 * dice_hits + dice_false + dice_missed
    present = areas > 0
    macro = 2 * dice_hits[present] / areas[present]
    return {
        # num_classes + 1 adds an empty class, ignore_index takes one off: K in the mean.
        "IOU_Jaccard_Bal": float(np.sum(share(hits[1:], unions[1:])) / len(hits)),
        "IOU_Jaccard": float(share(hits.sum(), unions[1:].sum())),
        "F1": float(share(hits.sum(), total)),
        "Dice": float(share(2 * dice_hits.sum(), areas.sum())),
        "Dice_Bal": float(macro.mean()) if len(macro) else 0.0,
    }


def derive_iou(dice: float) -> float:
    """The IoU that belongs to a Dice score of one class, or to one of pooled counts."""
    return dice / (2 - dice)


def derive_precision(dice: float, recall: float) -> float:
    """The precision that a Dice score (F1) and a recall of the same pixels leave."""
    return 1 / (2 / dice - 1 / recall)


def outcomes(counts: Counts) -> tuple[Counts, Counts, Counts]:
    """True positives, false positives and false negatives of each class."""
    hits = np.diagonal(counts).copy()
    return hits, counts.sum(0) - hits, counts.sum(1) - hits


def ratios(hits: np.int64, false: np.int64, missed: np.int64) -> dict[str, float]:
    """Scores of one class, those left out that would divide by 0."""
    values = {}
    if hits + false + missed:
        dice = 2 * hits / (2 * hits + false + missed)
        values = {"dice": dice, "jaccard": hits / (hits + false + missed), "f1": dice}
    if hits + missed:
        values["recall"] = hits / (hits + missed)
    if hits + false:
        values["precision"] = hits / (hits + false)
    return {name: float(value) for name, value in values.items()}


def share(part: ArrayLike, whole: ArrayLike) -> NDArray[np.float64]:
    """`part / whole`, 0 where `whole` is."""
    ratio: NDArray[np.float64] = np.asarray(part, np.float64) / np.maximum(np.asarray(whole), 1)
    return ratio
