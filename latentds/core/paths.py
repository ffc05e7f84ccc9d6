"""Paths as they are given: text where a Path is wanted."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

PATH_FIELD = re.compile(r"\bPath\b")  # in a field's annotation, which is text or a type


def take_paths(config: Any) -> None:
    """Make Paths of what a frozen config's fields of paths hold; for its `__post_init__`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None or not PATH_FIELD.search(str(field.type)):
            continue
        is_one = isinstance(value, str | os.PathLike)
        taken = Path(value) if is_one else tuple(Path(each) for each in value)
        object.__setattr__(config, field.name, taken)
