"""The tables of Yellapragada et al. 2025 as data: Table 1, and Tables 2 and 3."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("paper_tables.json")


@functools.cache
def paper_tables(part: Literal["fidelity", "evaluations"]) -> dict[str, Any]:
    """Values of Table 1 (source, settings, embedders, columns, rows), or of Tables 2 and 3 (source,
    labels, columns, rows)."""
    return dict(json.loads(FILE.read_text())[part])
