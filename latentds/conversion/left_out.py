"""What is left out of a conversion: a source or a patch of one, and why, as records."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from latentds.errors import InputError, Reason, UnusableError

Region = tuple[str, int, int]  # source, x, y


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A patch, or at (0, 0) a whole picture or its first patch, that no shard holds.

    reason  of the closed list in `latentds.errors`
    detail  the error's words, which may name a file; stored nowhere that names are hidden
    """

    source: str
    x: int
    y: int
    reason: Reason
    detail: str

    @property
    def region(self) -> Region:
        """What is left out, as a key."""
        return self.source, self.x, self.y

    def __str__(self) -> str:
        """What is left out, for people."""
        return self.source if self.x == self.y == 0 else f"{self.source} at ({self.x}, {self.y})"

    def to_json(self) -> list[Any]:
        """A line of a journal."""
        return list(dataclasses.astuple(self))


def record_of(source: str, place: tuple[int, int], error: InputError) -> LeftOut:
    """The record of why a patch or picture cannot be had."""
    reason: Reason = error.reason if isinstance(error, UnusableError) else "other"
    return LeftOut(source, *place, reason, str(error))


def by_region(records: Iterable[LeftOut]) -> dict[Region, LeftOut]:
    """Records by what they are about, each once."""
    return {record.region: record for record in records}


def sources_of(records: Iterable[LeftOut]) -> set[str]:
    """Distinct sources."""
    return {record.source for record in records}


def describe_left_out(
    records: Iterable[LeftOut], patches: Mapping[str, int], hide: Callable[[str], str] | None
) -> list[dict[str, Any]]:
    """Sources with reasons, sorted, for the manifest; `manifest.left_out_text` has it in words.

    patches  planned patches by source: of one with several it is said how many were left out
    hide     what stands for a source's name; then no detail is stored, for it may have names
    """
    found = sorted(set(records), key=lambda record: record.region)
    counts = Counter(record.source for record in found)
    entries = []
    for source, first in {record.source: record for record in reversed(found)}.items():
        entry: dict[str, Any] = {"source": source, "reason": first.reason, "detail": first.detail}
        if hide is not None:
            entry = {"source": hide(source), "reason": first.reason}
        if patches.get(source, 0) > 1:
            entry |= {"patches": counts[source], "of": patches[source]}
        entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["source"]))
