"""features.json: what made a folder of features; another run's features are not mixed in."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

from latentds.autoencoders.foreign_networks import checked_fields, is_object
from latentds.core.storage import passing_lock, read_json, write_atomically
from latentds.errors import ContractError, FormatError
from latentds.evaluation.features.layout import RECORD
from latentds.version import __version__

FORMAT = "latentds-features/1"
MAX_BYTES = 1 << 22
PATIENCE_S = 60.0  # ranks that start together take turns
MOST_TOLD = 4
CHECKS = {
    "embedder": is_object,
    "source": is_object,
    "options": is_object,
    "versions": is_object,
}
# Of the source: it may be measured on a sample, or lie elsewhere today.
NOT_COMPARED = ("source.bytes_per_patch", "source.data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeaturesRecord:
    """What a features.json says.

    embedder  its card: name, weights_id, rule, dim, ...
    source    SourceFacts of the patches, as JSON
    options   what decides about the numbers: batch size, precision, chosen patches, ...
    versions  of the packages that made the first of them, and the kind of device
    """

    embedder: dict[str, Any]
    source: dict[str, Any]
    options: dict[str, Any]
    versions: dict[str, str]

    def to_json(self) -> str:
        values = {"format": FORMAT} | dataclasses.asdict(self)
        return json.dumps(values, indent=1, sort_keys=True) + "\n"


def versions_of(device: str) -> dict[str, str]:
    """Versions that may move the last bits of a feature."""
    import torch

    return {
        "latentds": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
    }


def claim(folder: Path, record: FeaturesRecord) -> None:
    """Write the record, or see that the one there is of the same features.

    raises  ContractError that names what differs
    """
    with passing_lock(folder / f".{RECORD}.lock", PATIENCE_S):
        if not (folder / RECORD).exists():
            write_atomically(folder / RECORD, record.to_json().encode())
            return
    there = read_record(folder)
    found = differences(there, record)
    if found:
        more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
        raise ContractError(
            f"{folder / RECORD}: these features are of another run: "
            f"{'; '.join(found[:MOST_TOLD])}{more}. Give another --out, or the same options"
        )


def differences(there: FeaturesRecord, now: FeaturesRecord) -> list[str]:
    """What of two records differs that decides about features, in words."""
    old, new = comparable(there), comparable(now)
    return [
        f"{key} is {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted({*old, *new}, key=lambda key: (not key.endswith((".name", ".data")), key))
        if old.get(key) != new.get(key)
    ]


def comparable(record: FeaturesRecord) -> dict[str, Any]:
    """A record's values by dotted name; of paths the last part, for data may be moved."""
    parts = {"embedder": record.embedder, "source": record.source, "options": record.options}
    values = flat(json.loads(json.dumps(parts)), "")
    found = {name: value for name, value in values.items() if name not in NOT_COMPARED}
    return found | {"source.data": Path(str(record.source.get("data", ""))).name}


def flat(values: dict[str, Any], before: str) -> dict[str, Any]:
    """Values of nested dictionaries by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{before}{name}.")
            if isinstance(value, dict)
            else {f"{before}{name}": value}
        )
    return found


def read_record(folder: Path) -> FeaturesRecord:
    """What the features.json of a folder says; FormatError where it is none."""
    path = folder / RECORD
    fields = checked_fields(read_json(path, MAX_BYTES), path, FORMAT, CHECKS)
    if not isinstance(name := fields["embedder"].get("name"), str):
        raise FormatError(f"{path}: embedder.name is {name!r:.60}; refused")
    return FeaturesRecord(**fields)
