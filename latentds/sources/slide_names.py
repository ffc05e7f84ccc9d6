"""Names of slides: which known one a name means, names twice, TCGA barcodes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from latentds.errors import InputError

EXTENSIONS = (
    *(".ome.tiff", ".ome.tif", ".svs", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu"),
    *(".bif", ".dcm", ".svslide", ".zarr", ".h5", ".pt", ".png", ".jpeg", ".jpg", ".webp", ".bmp"),
)
SHOWN = 5  # names that a message lists
TCGA_SLIDE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[0-9A-Z]{2})-[0-9A-Z]{4})-(?P<sample>\d{2}[A-Z]?)-"
    r"(?P<portion>\d{2}[A-Z]?)-(?P<kind>DX|TS|BS|MS)(?P<number>[0-9A-Z]+)(?:\..*)?"
)


class NameIndex:
    """Known names, to be found by what others call them.

    A name is looked for, in this order, as it stands; without a file's extension; by the end of
    one path that is the whole of the other; by its TCGA slide barcode, unless both have a UUID and
    it differs. The first way that finds anything counts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.exact = places_by(names, lambda name: name)
        self.plain = places_by(names, plain_name)

    def find_all(self, name: str) -> list[int]:
        """Places of all known names that it may mean, ascending; more than one is ambiguous."""
        if name in self.exact:
            return self.exact[name]
        plain = plain_name(name)
        for end in path_ends(plain):
            if end in self.plain:
                return self.plain[end]
        return self.ends.get(plain) or self.find_barcode(plain)

    @functools.cached_property
    def ends(self) -> dict[str, list[int]]:
        """Places of the known paths by each shorter path in which they end."""
        ends: dict[str, list[int]] = defaultdict(list)
        for place, known in enumerate(self.names):
            for end in path_ends(plain_name(known))[1:]:
                ends[end].append(place)
        return dict(ends)

    @functools.cached_property
    def barcodes(self) -> dict[str, list[int]]:
        return places_by(self.names, lambda name: barcode_of(name)[0])

    def find_barcode(self, plain: str) -> list[int]:
        """Places of the known names of the same TCGA slide, none of which is another file of it."""
        slide, uuid = barcode_of(plain)
        places = self.barcodes.get(slide, []) if slide else []
        own = {place: barcode_of(self.names[place])[1] for place in places}
        return [place for place in places if not uuid or own[place] in ("", uuid)]

    def find(self, name: str, where: str) -> int | None:
        """The place of the only known name it can mean, None for none.

        raises  InputError where it can mean several; `where` says what holds it
        """
        places = self.find_all(name)
        if len({self.names[place] for place in places}) > 1:
            meant = [self.names[place] for place in places]
            raise InputError(f"{where}: {name!r} can mean {some(meant)}; give the whole name")
        return places[0] if places else None

    def match(self, names: Iterable[str], where: str) -> dict[str, int | None]:
        """`find` for all the distinct names.

        raises  InputError also where two of them can only mean the same one
        """
        matched: dict[str, int | None] = {}
        taken: dict[str, str] = {}
        for name in dict.fromkeys(names):
            place = matched[name] = self.find(name, where)
            if place is None:
                continue
            other = taken.setdefault(self.names[place], name)
            if other != name:
                raise InputError(
                    f"{where}: {other!r} and {name!r} would both be {self.names[place]!r}; "
                    "give whole names"
                )
        return matched


def places_by(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        found[key(name)].append(place)
    return dict(found)


def plain_name(name: str) -> str:
    """A name with slashes, without ./ before it and a picture's or slide's extension behind it."""
    path = name.strip().replace("\\", "/").removeprefix("./").strip("/")
    low = path.lower()
    for extension in EXTENSIONS:
        if low.endswith(extension) and len(low) > len(extension):
            return path[: -len(extension)]
    return path


def path_ends(path: str) -> list[str]:
    """The path, then its ends from the longest to the last part."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


@dataclasses.dataclass(frozen=True)
class Barcode:
    """Parts of a TCGA slide's barcode: TCGA-3C-AALI-01Z-00-DX1[.UUID].

    patient  TCGA-3C-AALI
    site     3C, the tissue source site
    sample   TCGA-3C-AALI-01Z
    slide    TCGA-3C-AALI-01Z-00-DX1
    is_frozen  TS, BS and MS are frozen sections, DX is formalin-fixed
    """

    patient: str
    site: str
    sample: str
    slide: str
    is_frozen: bool


def parse_barcode(name: str) -> Barcode | None:
    """The barcode in a slide's name, None where it is none."""
    found = TCGA_SLIDE.fullmatch(name)
    if found is None:
        return None
    sample = f"{found['patient']}-{found['sample']}"
    slide = f"{sample}-{found['portion']}-{found['kind']}{found['number']}"
    return Barcode(found["patient"], found["site"], sample, slide, found["kind"] != "DX")


def barcode_of(name: str) -> tuple[str, str]:
    """TCGA slide barcode and what follows its dot, both empty where the name is none."""
    last = plain_name(name).rpartition("/")[2]
    code = parse_barcode(last)
    return (code.slide, last[len(code.slide) + 1 :].lower()) if code else ("", "")


def some(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    listed = ", ".join(repr(name) for name in names[:SHOWN])
    more = len(names) - SHOWN
    return f"{listed} and {more:,} more" if more > 0 else listed


def named_once(root: Path, named: Iterable[tuple[str, str]], what: str = "slide") -> dict[str, str]:
    """Places by name; InputError where two have one, as their patches could not be told apart."""
    found: dict[str, str] = {}
    for name, place in named:
        other = found.setdefault(name, place)
        if other != place:
            raise InputError(
                f"{root}: {other} and {place} are both {what} {name!r}; rename or remove one"
            )
    return found


def describe_barcodes(slides: Iterable[str]) -> dict[str, Any]:
    """What the TCGA barcodes among slide names say together; empty where there are none."""
    found = [code for name in slides if (code := parse_barcode(name)) is not None]
    if not found:
        return {}
    return {
        "patients": len({code.patient for code in found}),
        "samples": len({code.sample for code in found}),
        "slides": len({code.slide for code in found}),
        "frozen_slides": sum(code.is_frozen for code in found),
    }
