"""What folds of label maps came to: scores, the record, images.csv, the table, pictures."""
# n images tested, K labels with 0, h w pixels

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from latentds_trainers.crossval.cross_validation import (
    Cell,
    CrossValidation,
    FoldOutcome,
    Tested,
    run_record,
    run_table,
    spread,
    told_settings,
    write_result,
)
from latentds_trainers.sampath.config import SampathConfig, SegmentationSettings
from latentds_trainers.sampath.segmentation_data import FoldPlan
from PIL import Image, ImageDraw

from latentds.core.storage import write_atomically
from latentds.evaluation.records import RunRecord
from latentds.evaluation.segmentation import (
    COMPAT_REASON,
    SCORES,
    Confusion,
    correct_scores,
    sampath_compat_scores,
)
from latentds.sources.csv_tables import write_table

PRIMARY, COMPAT = "dice_macro", "sampath_"
SIDE_BY_SIDE = (  # correct scores, and what SAM-Path's code calls by their names
    ("dice_macro", "Dice_Bal"),
    ("dice_micro", "Dice"),
    ("f1_micro", "F1"),
    ("jaccard_macro", "IOU_Jaccard_Bal"),
    ("jaccard_micro", "IOU_Jaccard"),
    ("recall_micro", None),
    ("precision_micro", None),
    ("pixel_accuracy", None),
)
NOT_TELLING = ("images", "image", "img")  # folders that are named after what is in them
IMAGE_SCORES = ("dice_macro", "jaccard_macro", "pixel_accuracy")
ONE_SEED = (
    "one training a fold: SAM-Path's authors and the paper have one too, and differences below "
    "half a point are then no evidence; --seeds 0 1 2 trains three"
)
COLOURS = (  # of the labels 1, 2, ...; told apart by colour-blind readers too (Okabe and Ito 2008)
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66),
    (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
GAP_PX, LEGEND_PX = 8, 20


def score_fold(
    settings: SegmentationSettings, cell: Cell, counts: np.ndarray, *, seconds: float = 0.0
) -> Tested:
    """What a fold's test came to: correct scores, then SAM-Path's, named `sampath_...`.

    counts  int64 (n, K, K): pixels by true and predicted label, image by image
    """
    confusion = Confusion(settings.values.names, counts.sum(0))
    correct = correct_scores(confusion, settings.left_out)
    unscored = settings.left_out[1:]
    compat = sampath_compat_scores(confusion, unscored[0] if unscored else None)
    scores: dict[str, float | None] = dict.fromkeys(SCORES) | correct.scores
    undefined = (
        f"fold {cell.number}, seed {cell.seed}: no scored class has a pixel in truth or "
        "prediction; its scores are undefined and count in no mean (SAM-Path's code calls them 0)"
    )
    return Tested(
        found=counts,
        scores=scores | {COMPAT + name: value for name, value in compat.items()},
        per_class={name: dict(values) for name, values in correct.per_class.items()},
        notes=[] if correct.per_class else [undefined],
        seconds=seconds,
    )


def report(
    config: SampathConfig,
    run: CrossValidation,
    plan: FoldPlan,
    outcomes: Sequence[FoldOutcome],
    *,
    source: dict[str, Any],
    images_a_step: int,
    notes: Sequence[str] = (),
) -> None:
    undefined = [note for outcome in outcomes for note in outcome.notes]
    one_seed = [ONE_SEED] if len(run.seeds) == 1 else []
    own = config.settings
    record = run_record(
        run,
        outcomes,
        data=data_name(config.data),
        source=source,
        embedder=encoder_name(config),
        model="unet" if config.model == "unet" else "sam-path",
        classes=[name for name in own.classes if name not in own.unscored],
        split_rule=plan.rule,
        primary=PRIMARY,
        settings=told_settings(config) | {"images_a_step": images_a_step},
        notes=[*plan.notes, *notes, *undefined, COMPAT_REASON, *one_seed],
    )
    write_images(config.out, own, outcomes)
    write_result(config.out, record, table(record), is_json=config.json)


def encoder_name(config: SampathConfig) -> str | None:
    """The pathology encoder, without the place of its file: two runs of one are of one family."""
    if config.model != "sampath" or config.pathology_encoder is None:
        return None
    kind, colon, rest = config.pathology_encoder.partition("@")[0].partition(":")
    return f"{kind}:{Path(rest).name}" if colon and "/" in rest else f"{kind}{colon}{rest}"


def data_name(data: Path) -> str:
    """Name of the data set's folder; its parent's where it only says that images are in it."""
    path = data.resolve() if data.exists() else data
    return path.parent.name if path.name.lower() in NOT_TELLING else path.name


def write_images(
    out: Path, settings: SegmentationSettings, outcomes: Sequence[FoldOutcome]
) -> None:
    """images.csv: fold, seed, item, group and scores of every tested image."""
    rows: list[list[object]] = []
    for outcome in outcomes:
        for item, group, counts in zip(outcome.items, outcome.groups, outcome.found, strict=True):
            confusion = Confusion(settings.values.names, counts)
            scores = correct_scores(confusion, settings.left_out).scores
            figures = [f"{scores[name]:.6f}" if name in scores else "" for name in IMAGE_SCORES]
            rows.append([outcome.fold, outcome.seed, item, group, *figures])
    columns = ["fold", "seed", "item", "group", *IMAGE_SCORES]
    write_table(out / "images.csv", columns, rows)


def table(record: RunRecord) -> str:
    """The record as text, correct scores and SAM-Path's side by side."""
    means = [f"{'mean ± sd':<18}{'correct':>18}    {'sampath-compat':<16}"]
    for name, compat in SIDE_BY_SIDE:
        line = f"{name:<18}{spread(record.summarize(name)):>18}"
        if compat is not None:
            line += f"    {compat:<16}{spread(record.summarize(COMPAT + compat)):>18}"
        means.append(line)
    return run_table(
        record,
        f"{record.data}: {', '.join(record.classes)}; {record.model} on {record.source['name']}",
        shown=(PRIMARY, "dice_micro", "jaccard_macro", "jaccard_micro", "pixel_accuracy"),
        per_class=("dice", "jaccard", "recall", "precision"),
        more=means,
    )


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
