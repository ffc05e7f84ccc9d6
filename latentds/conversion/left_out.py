"""Names of what is left out of a conversion: a source, or a patch of one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath

PLACE = re.compile(r"(.*) at \((-?\d+), (-?\d+)\)", re.DOTALL)


def region_name(source: str, x: int, y: int) -> str:
    """The name of a patch: its source's own where it is the first, or the only one."""
    return source if x == y == 0 else f"{source} at ({x}, {y})"


def source_of(name: str) -> str:
    """The source of a patch's name."""
    found = PLACE.fullmatch(name)
    return found[1] if found else name


def sources_of(names: Iterable[str]) -> set[str]:
    """Distinct sources."""
    return {source_of(name) for name in names}


def describe_left_out(
    bad: Mapping[str, str], patches: Mapping[str, int], hide: Callable[[str], str] | None
) -> list[dict[str, str]]:
    """Sources with reasons, sorted, for the manifest.

    bad      reasons by name of source or patch
    patches  planned patches by source, for those of which only some were left out
    hide     what stands for a source's name; reasons then say no word that comes from names
    """
    counts = Counter(source_of(name) for name in bad)
    reasons = {source_of(name): reason for name, reason in sorted(bad.items(), reverse=True)}
    entries = []
    for source, reason in reasons.items():
        total = patches.get(source, 0)
        shown = reason if hide is None else without_names(reason)
        if total > 1:
            shown = f"{counts[source]} of {total} patches: {shown}"
        entries.append({"source": source if hide is None else hide(source), "reason": shown})
    return sorted(entries, key=lambda entry: entry["source"])


def without_names(reason: str) -> str:
    """The part of a reason that is ours: what a file is called stands in brackets or behind it."""
    words = re.split(r"[(:;,]", reason, maxsplit=1)[0].split()
    return " ".join(word for word in words if not PurePosixPath(word).suffix and "/" not in word)
