"""left_out.json: slides of which a run made no features, with the reasons; none, no file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentds.core.json_text import read_json
from latentds.core.storage import passing_lock, write_atomically
from latentds.errors import FormatError

FILE = "left_out.json"
MAX_BYTES = 1 << 26
PATIENCE_S = 60.0  # ranks that end together take turns


def note_left_out(folder: Path, tried: Sequence[str], bad: Mapping[str, str]) -> None:
    """Record that of the slides `tried` by a rank, the `bad` ones failed; others' are kept."""
    with passing_lock(folder / f".{FILE}.lock", PATIENCE_S):
        found = read_left_out(folder)
        kept = {slide: reason for slide, reason in found.items() if slide not in set(tried)}
        if now := dict(sorted((kept | dict(bad)).items())):
            write_atomically(folder / FILE, json.dumps(now, indent=1).encode())
        else:
            (folder / FILE).unlink(missing_ok=True)


def read_left_out(folder: Path) -> dict[str, str]:
    """The slides left out and why; FormatError where the file is damaged."""
    path = folder / FILE
    if not path.exists():
        return {}
    values = read_json(path, MAX_BYTES, "delete it")
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise FormatError(f"{path}: not reasons by slide; delete it")
    return values
