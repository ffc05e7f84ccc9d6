"""What the fields of augmentations may be."""

from __future__ import annotations

from collections.abc import Sequence


def at_least(least: int, **values: int) -> None:
    """Refuse a whole number below `least`, by its field."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}; at least {least}")


def probabilities(**values: float | Sequence[float]) -> None:
    """Refuse what is no probability, or are none."""
    for name, value in values.items():
        several = value if isinstance(value, Sequence) else (value,)
        if not all(0 <= one <= 1 for one in several):
            raise ValueError(f"{name}={value}; probabilities lie between 0 and 1")


def ranges(most: float | None = None, **values: tuple[float, float] | None) -> None:
    """Refuse a (from, to) that runs backwards, is not above 0, or goes beyond `most`."""
    for name, value in values.items():
        if value is not None and not (0 < value[0] <= value[1] <= (most or value[1])):
            limit = "" if most is None else f" <= {most}"
            raise ValueError(f"{name}={value}; (from, to) with 0 < from <= to{limit}")


def strengths(**values: float | Sequence[float]) -> None:
    """Refuse a negative strength."""
    for name, value in values.items():
        several = value if isinstance(value, Sequence) else (value,)
        if not all(one >= 0 for one in several):
            raise ValueError(f"{name}={value}; strengths are 0 (off) or more")


def threes(**values: Sequence[float] | None) -> None:
    """Refuse what does not have three numbers."""
    for name, value in values.items():
        if value is not None and len(value) != 3:
            raise ValueError(f"{name}={value}; three numbers")
