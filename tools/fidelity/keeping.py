"""Finished rows and their files on disk, by a hash of all that makes them.

A killed run goes on after the last; another embedder or decoder does not encode anew.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from latentds_tools.fidelity.measuring import Encoded, Measured

from latentds.core.storage import canonical_json, write_atomically
from latentds.errors import InputError


class KeptRows:
    """Rows below a folder; nothing is kept where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def find(self, facts: dict[str, Any]) -> Measured | None:
        """The row that was measured with just these facts, None where there is none."""
        if self.folder is None:
            return None
        path = self.folder / f"{key_of(facts)}.json"
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
            shown = np.load(path.with_suffix(".npy"), allow_pickle=False)
            return Measured(values["per_crop"], values["seconds"], shown)
        except (ValueError, KeyError, EOFError, FileNotFoundError):
            return None  # not one that this version wrote whole: measured again

    def find_encoded(self, facts: dict[str, Any]) -> Encoded | None:
        """The files that a codec made under just these facts, None where there are none."""
        if self.folder is None:
            return None
        try:
            with np.load(self.folder / f"{key_of(facts)}.npz", allow_pickle=False) as arrays:
                return Encoded.from_arrays(dict(arrays))
        except (ValueError, KeyError, EOFError, FileNotFoundError, zipfile.BadZipFile):
            return None

    def keep_encoded(self, facts: dict[str, Any], encoded: Encoded) -> None:
        if self.folder is None:
            return
        content = io.BytesIO()
        arrays: dict[str, Any] = encoded.to_arrays()
        np.savez(content, **arrays)
        write_atomically(self.folder / f"{key_of(facts)}.npz", content.getvalue())

    def keep(self, facts: dict[str, Any], row: Measured) -> None:
        """Write a row, its pictures first: the JSON's presence means both."""
        if self.folder is None:
            return
        path = self.folder / f"{key_of(facts)}.json"
        pictures = io.BytesIO()
        np.save(pictures, row.shown, allow_pickle=False)
        write_atomically(path.with_suffix(".npy"), pictures.getvalue())
        values = {"facts": facts, "per_crop": row.per_crop, "seconds": row.seconds}
        write_atomically(path, json.dumps(values, allow_nan=False).encode())


def key_of(facts: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:24]


def check_finite(values: dict[str, Any], where: str) -> None:
    """Refuse figures that are NaN: something is broken, and no table should hide it."""
    for name, column in values.items():
        if isinstance(column, dict):
            check_finite(column, where)
        elif any(isinstance(v, float) and not math.isfinite(v) for v in column):
            raise InputError(f"{where}: {name} is not finite for some crop; check its weights")
