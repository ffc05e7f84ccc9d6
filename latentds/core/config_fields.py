"""What a config is given: text for its paths, locations that lost a slash, numbers in limits."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from latentds.errors import InputError

LOCATION = re.compile(r"([a-z][a-z0-9+]+):/+(.+)")
PATH_FIELD = re.compile(r"\bPath\b")  # in a field's annotation, which is text or a type
HOSTLESS = {"file", "local"}  # schemes after whose slashes a path begins and no host


def take_paths(config: Any) -> None:
    """Make Paths of what a frozen config's fields of paths hold; for its `__post_init__`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or not PATH_FIELD.search(str(field.type)):
            continue
        is_one = isinstance(value, str | os.PathLike)
        taken = Path(value) if is_one else tuple(Path(each) for each in value)
        object.__setattr__(config, field.name, taken)


def check_ranges(config: object, **limits: tuple[float, float]) -> None:
    """InputError where an option that is given lies outside its limits."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")


def location_of(path: str | os.PathLike[str]) -> str | None:
    """The location a path was typed as (pathlib makes s3:/bucket of s3://bucket), or None."""
    found = LOCATION.fullmatch(Path(path).as_posix())
    slashes = "///" if found and found[1] in HOSTLESS else "//"
    return f"{found[1]}:{slashes}{found[2]}" if found else None
