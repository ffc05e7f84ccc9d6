"""The table a patch classification prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from latentds.core.display import say
from latentds.evaluation.statistics import summary

if TYPE_CHECKING:
    from latentds_trainers.classify_patches.classify_results import FoldOutcome

    from latentds.evaluation.records import RunRecord


def print_table(record: RunRecord, outcomes: Sequence[FoldOutcome], patches: int) -> None:
    """Scores over the folds, colour histograms below them, classes, notes."""
    with_what = f"{record.model} of {record.embedder}" if record.embedder else record.model
    height, width = record.source["patch_px"]
    say(
        f"{record.data}: {patches:,} patches of {width}x{height} px, {len(record.classes)} classes;"
        f" {with_what}; {record.split_rule}"
    )
    metrics = record.metrics()
    rows = [
        (record.source["name"], {name: record.summarize(name).to_json() for name in metrics}),
        *record.related.items(),
    ]
    first = max(len(name) for name, _ in rows) + 2
    say(" " * first + "".join(f"{name:>20}" for name in metrics))
    for name, values in rows:
        say(f"{name:<{first}}" + "".join(f"{shown(values[m]):>20}" for m in metrics))
    print_classes(record, outcomes)
    for note in record.notes:
        say(f"note: {note}")


def print_classes(record: RunRecord, outcomes: Sequence[FoldOutcome]) -> None:
    """Mean recall, precision and F1 of every class over the folds."""
    names = ("recall", "precision", "f1")
    first = max(len(name) for name in record.classes) + 2
    say(" " * first + "".join(f"{name:>20}" for name in names))
    for label in record.classes:
        cells = [
            shown(summary([outcome.per_class[label][name] for outcome in outcomes]).to_json())
            for name in names
        ]
        say(f"{label:<{first}}" + "".join(f"{cell:>20}" for cell in cells))


def shown(value: dict[str, Any]) -> str:
    """Mean and deviation."""
    if value["mean"] is None:
        return "undefined"
    sd = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    return f"{value['mean']:.4f}{sd}"
