"""Licences: which identifiers the Hub knows, and what of what is published forbids trade."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from latentds.errors import InputError, unknown_name

# hub-docs, repositories-licenses.md, those made for data or found on data sets. 'unknown' and 'cc'
# are left out: neither says what is allowed. What is not here goes as 'other', with name and link.
HUB_LICENCES = (
    *("afl-3.0", "agpl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause"),
    *("bsl-1.0", "c-uda", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),
    *("cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0"),
    *("cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0"),
    *("cc-by-nc-sa-4.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0"),
    *("ecl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "isc"),
    *("lgpl", "lgpl-2.1", "lgpl-3.0", "mit", "mpl-2.0", "odbl", "odc-by", "openrail", "openrail++"),
    *("other", "pddl", "unlicense", "wtfpl", "zlib"),
)
# cc-by-nc-4.0, CC BY-NC-SA, "non-commercial", "noncommercial use only", ...
NON_COMMERCIAL = re.compile(r"\bnc\b|non-?\s?commercial|research[ -]only", re.IGNORECASE)
LICENCE_FIELDS = ("licence", "license")


def check_licence(identifier: str | None, name: str | None) -> str:
    """The licence's identifier, if a set may be published under it.

    raises  InputError where it is missing or is 'other' without a name, UnknownNameError where the
            Hub does not know it
    """
    if not identifier:
        raise InputError(
            "no licence: nobody may use a set that has none. Pass --license ID, such as cc0-1.0 or "
            "cc-by-4.0, or '--license other --license-name NAME'"
        )
    if identifier not in HUB_LICENCES:
        raise unknown_name("licence", identifier, HUB_LICENCES)
    if identifier == "other" and not name:
        raise InputError("--license other: say which; pass --license-name NAME")
    return identifier


def read_markdown(path: Path | None) -> str:
    """The text of a publisher's file, none without one; InputError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8") if path else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error.reason} at {error.start})") from error


def is_non_commercial(licence: str) -> bool:
    """Whether a licence's name says that commercial use is forbidden."""
    return bool(NON_COMMERCIAL.search(licence.replace("_", " ")))


def licence_warnings(parts: Iterable[tuple[str, str, bool]], identifier: str) -> list[str]:
    """What a publisher should know before something goes out under `identifier`, a line each.

    parts  what it comes from, the licence of that, whether that is gated
    """
    lines = []
    for what, licence, is_gated in parts:
        if is_non_commercial(licence) and not is_non_commercial(identifier):
            lines.append(f"{what} is non-commercial ({licence}), published as {identifier}")
        if licence.lower().startswith("unknown"):
            lines.append(f"the licence of {what} is not known ({licence}); say it in --notes")
        if is_gated:
            lines.append(f"{what} is gated ({licence}); see what that licence allows")
    return lines


def recorded_licences(record: Any) -> Iterator[str]:
    """Licences anywhere in what a manifest records of a set's making and sources."""
    if isinstance(record, dict):
        for field, value in record.items():
            if field in LICENCE_FIELDS and isinstance(value, str):
                yield value
            else:
                yield from recorded_licences(value)
    elif isinstance(record, list):
        for value in record:
            yield from recorded_licences(value)
