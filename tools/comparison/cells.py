"""What stands in the cells of the comparison's tables."""

from __future__ import annotations

from typing import Any

from latentds_tools.reports.markdown import ABSENT, bracketed, number

NAMES = {
    "auc": "AUC",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "dice_macro": "Dice macro",
}


def title(metric: str | None) -> str:
    """What tables and plots call a score."""
    return NAMES.get(str(metric), str(metric))


def flags(row: dict[str, Any]) -> list[str]:
    """FT and Quant; a dash for what is no network."""
    if not row["is_network"]:
        return [ABSENT, ABSENT]
    return ["yes" if row[name] else "no" for name in ("fine_tuned", "quantized")]


def size(row: dict[str, Any] | None) -> str:
    """Kilobytes of a patch."""
    value = None if row is None else row["kilobytes"]
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def score(row: dict[str, Any] | None, metric: str | None) -> str:
    """A row's mean and sd in per cent."""
    return ABSENT if row is None or metric is None else mean_sd(row["scores"].get(metric))


def mean_sd(values: dict[str, Any] | None) -> str:
    """A mean in per cent, with its sd where there is one."""
    if not values or values.get("mean") is None:
        return ABSENT
    if values.get("sd") is None:
        return percent(values["mean"])
    return f"{percent(values['mean'])} ± {percent(values['sd'])}"


def percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, ".2f")


def difference(row: dict[str, Any] | None) -> str:
    """The difference to the reference in points, its interval, wins."""
    if row is None:
        return ABSENT
    found = row["difference"]
    if found is None or found["mean"] is None:
        return "not paired" if row["not_paired"] not in (None, "no reference") else ABSENT
    mean, low, high = (found[name] and 100 * found[name] for name in ("mean", "low", "high"))
    text = bracketed(mean, low, high, "+.2f")
    ties = f", {found['ties']} equal" if found["ties"] else ""
    return f"{text}, {found['wins']} of {found['n']}{ties}"
