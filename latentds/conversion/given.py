"""What another program says of a patch it gives: checked, in one type each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from latentds.errors import InputError
from latentds.store.format import SPLIT_PATTERN, patch_key

MAX_PLACE = 2**31 - 1  # x, y and size_px are int32 columns


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What a program says of a patch; `Patch` has the same words, crc32 is its pixels'."""

    source: str
    split: str
    label: str | None
    slide: str | None
    x: int | None
    y: int | None
    size_px: int | None
    mpp: float | None
    encoding: str
    crc32: int

    @property
    def key(self) -> str:
        """The patch's key in the data set."""
        return patch_key(self.source, self.x, self.y)


def spread(name: str, value: Any, count: int) -> Sequence[Any]:
    """A word for each of `count` images: one for all, or a sequence of as many."""
    if value is None or isinstance(value, str | bytes | PurePath) or np.ndim(value) == 0:
        return [value] * count
    if len(value) != count:
        raise InputError(f"{name}: {len(value)} values for {count} images")
    return list(value)


def checked(
    crc32: int, *, slide: Any, x: Any, y: Any, mpp: Any, label: Any, split: Any, size_px: Any,
    source: Any, encoding: Any,
) -> Given:  # fmt: skip
    """What is said of a patch, in its own types; InputError names the word and its value."""
    named = {"slide": slide, "label": label, "source": source, "encoding": encoding}
    names = {word: text_of(word, value) for word, value in named.items()}
    source = names["source"] or names["slide"]
    if source is None:
        raise InputError("a patch has neither slide nor source; one of them names it")
    for word in ("slide", "source"):
        given = names[word] or ""
        if given.startswith(("/", "\\", "~")) or ".." in PurePath(given).parts or given[1:2] == ":":
            raise InputError(f"{word} {given!r}: a name, or a path relative to your input")
    if (x is None) != (y is None):
        raise InputError(f"x is {x}, y is {y}; give both or neither ({source})")
    if not isinstance(split, str) or not SPLIT_PATTERN.fullmatch(split):
        raise InputError(f"split {split!r}: a split's name is a-z, 0-9 and _, up to 32")
    place = {word: whole(word, value) for word, value in (("x", x), ("y", y), ("size_px", size_px))}
    if mpp is not None and not (math.isfinite(float(mpp)) and 0.01 <= float(mpp) <= 100):
        raise InputError(f"mpp is {mpp}; 0.01 to 100 micrometres a pixel ({source})")
    return Given(
        source=source,
        split=str(split),
        label=names["label"],
        slide=names["slide"],
        **place,
        mpp=None if mpp is None else float(mpp),
        encoding=names["encoding"] or "pixels",
        crc32=crc32,
    )


def text_of(word: str, value: Any) -> str | None:
    """A name, None for none; InputError for what is no text."""
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise InputError(f"{word} is {value!r}; a name as text, or None")
    return str(value)


def whole(word: str, value: Any) -> int | None:
    """A whole number of pixels, also as a float; InputError for others."""
    if value is None:
        return None
    if not float(value).is_integer() or not 0 <= value <= MAX_PLACE:
        raise InputError(f"{word} is {value}; a whole number of pixels of level 0, 0 or more")
    return int(value)
