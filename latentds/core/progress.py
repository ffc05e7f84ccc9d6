"""Progress of long work: a bar on a terminal, a line every half minute in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_S = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} gone, {remaining} left{postfix}"


class Lines:
    """Standard error for a bar that is no terminal's: what it draws anew becomes a line."""

    def write(self, text: str) -> None:
        """Write a drawing of the bar as a line of its own."""
        line = text.strip("\r\n ")
        if line:
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """Hand on what was written."""
        sys.stderr.flush()


def progress(steps: Iterable[Any] | None = None, **words: Any) -> tqdm[Any]:
    """tqdm's bar, with its words; where standard error is a file, a line every 30 s.

    total  always, or steps with a length: without it neither can say what is left
    """
    if sys.stderr.isatty():
        return tqdm(steps, **{"delay": 1, "dynamic_ncols": True, "file": sys.stderr, **words})
    lines = {"mininterval": LINE_S, "maxinterval": LINE_S, "delay": LINE_S, "miniters": 1,
             "bar_format": LINE, "file": Lines()}  # fmt: skip
    return tqdm(steps, **{**words, **lines})
