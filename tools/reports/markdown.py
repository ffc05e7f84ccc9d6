"""Markdown of reports: tables, and figures as they stand in cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

ABSENT = "-"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, form: str) -> str:
    """A figure in a format such as `.2f`, or a dash."""
    return ABSENT if value is None else format(value, form)


def bracketed(mean: float | None, low: float | None, high: float | None, form: str) -> str:
    """A mean and its interval, where there is one."""
    if mean is None or low is None or high is None:
        return number(mean, form)
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
