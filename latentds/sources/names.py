"""What names say: TCGA barcodes, splits of patients, folders of masks."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from latentds.core.randomness import key_of
from latentds.errors import InputError
from latentds.store.format import alike_names

TCGA_PATIENT = re.compile(r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4})(?:-|$)")
# Patients in the names of public slides: the whole match, at the beginning of a name.
PATIENTS = {
    "TCGA": TCGA_PATIENT,
    "CPTAC": re.compile(r"(C3[LN]-\d{5})(?:[-_.]|$)"),
    "GTEx": re.compile(r"(GTEX-[0-9A-Z]{4,5})(?:-|$)"),
    "CAMELYON17": re.compile(r"(patient_\d{3})(?:_node_\d+.*|\.zip)?$"),
    "CAMELYON16": re.compile(  # a slide a patient; PCam has camelyon16_ before it
        r"(?:camelyon16_(?:train_)?)?((?:normal|tumor|test)_\d{3})(?:_mask)?$"
    ),
}
# Folders that only hold: `images` alone at its place is no class.
HOLDERS = {"images", "image", "img", "imgs", "slides", "wsi", "wsis", "patches", "tiles", "data"}
# What holds the masks of the pictures in a folder of HOLDERS beside it.
MASK_FOLDERS = {
    *("mask", "masks", "label", "labels", "gt", "groundtruth", "ground_truth", "instances"),
    *("annotation", "annotations", "segmentation", "segmentations"),
}
MASK_SUFFIX = re.compile(r"[_-](?:masks?|labels?|seg|gt|instances?)$", re.IGNORECASE)
# A slide of those at the beginning of a tile's or folder's name; of TCGA with its UUID.
SLIDE_IN_NAME = re.compile(
    r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}-\d{2}[A-Z]?-\d{2}[A-Z]?-(?:DX|TS|BS|MS)[0-9A-Z]+"
    r"(?:\.[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12})?"
    r"|C3[LN]-\d{5}-\d+|GTEX-[0-9A-Z]{4,5}-\d{4}|patient_\d{3}_node_\d)(?![0-9A-Za-z])"
)
NO_CLASS = {"na", "n/a", "#n/a", "nan", "null", "none"}  # what programs write for no value
UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
DICOM_UID = re.compile(r"\d+(?:\.\d+){5,}")
TCGA_SLIDE = re.compile(
    r"(?P<patient>TCGA-(?P<site>[0-9A-Z]{2})-[0-9A-Z]{4})-(?P<sample>\d{2}[A-Z]?)-"
    r"(?P<portion>\d{2}[A-Z]?)-(?P<kind>DX|TS|BS|MS)(?P<number>[0-9A-Z]+)(?:\..*)?"
)


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


def known_patient(slide: str) -> tuple[str, str] | None:
    """Scheme and patient of a slide's name, or of the end of its path; None where none fits."""
    last = slide.rpartition("/")[2]
    for scheme, pattern in PATIENTS.items():
        if found := pattern.match(last):
            return scheme, found[1]
    return None


def patient_of(slide: str) -> str:
    """Patient of a slide where its name has one of the known schemes, else the slide itself."""
    found = known_patient(slide)
    return found[1] if found else slide


def is_identifier(folder: str) -> bool:
    """Whether a folder is named by UUID, DICOM UID, centre, patient or slide, as no class is."""
    is_number = any(kind.fullmatch(folder) for kind in (UUID, DICOM_UID, CENTRE))
    return is_number or known_patient(folder) is not None


CENTRE = re.compile(r"cent(?:er|re)_?\d+", re.IGNORECASE)  # CAMELYON17's folders
# x and y in a tile's name where it says so: `..._x1024_y2048`, `x=1024,y=2048`.
NAMED_PLACE = re.compile(
    r"(?<![a-z])x=?[-_]?(\d{1,9})[_,;-]+y=?[-_]?(\d{1,9})(?!\d)", re.IGNORECASE
)
DUMPED = re.compile(r"\d{6}_x\d+_y\d+\.\w+")  # TRIDENT's patch_images/SLIDE/000000_x0_y512.png
# QuPath's TileExporter: `slide [d=2,x=0,y=512,w=512,h=512].png`, in pixels of level 0.
QUPATH = re.compile(
    r"(.+?) ?\[(?:d=[\d.]+,)?x=(-?\d{1,9}),y=(-?\d{1,9}),w=(\d{1,9}),h=\d{1,9}[^\]]*\][^/]*$"
)


def path_fields(path: str) -> dict[str, Any]:
    """What a picture's own path tells by known rules: a slide of a known scheme, a named place."""
    found: dict[str, Any] = {}
    parts = path.replace("\\", "/").split("/")
    slides = [SLIDE_IN_NAME.match(part) for part in parts]
    named = [match[1] for match in slides if match]
    if named:
        found["slide"] = named[-1]
    if tile := QUPATH.match(parts[-1]):
        found["size_px"] = int(tile[4])
        if "-" not in tile[2] + tile[3]:  # beyond the slide's corner is no place of a table
            found |= {"x": int(tile[2]), "y": int(tile[3])}
        found.setdefault("slide", tile[1])
    elif place := NAMED_PLACE.search(parts[-1]):
        found |= {"x": int(place[1]), "y": int(place[2])}
        if DUMPED.fullmatch(parts[-1]) and len(parts) > 1:
            found.setdefault("slide", parts[-2])
    return found


def name_fields(pattern: str) -> Callable[[str], dict[str, Any]]:
    """A function from a source path to the fields a `--name-pattern` finds in it.

    Groups may be called label, slide, x, y and mpp; a path that does not match is an InputError.
    """
    known = {"label", "slide", "x", "y", "mpp"}
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"--name-pattern {pattern!r} is not a regular expression ({error})"
        ) from error
    if not compiled.groupindex or set(compiled.groupindex) - known:
        raise InputError(f"--name-pattern {pattern!r} needs named groups among {sorted(known)}")

    def fields(source: str) -> dict[str, Any]:
        match = compiled.search(source)
        if match is None:
            raise InputError(f"{source}: does not match --name-pattern {pattern!r}")
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        return found | numbers_of(source, found)

    return fields


def numbers_of(source: str, fields: dict[str, str]) -> dict[str, float]:
    """Places and resolutions; InputError for one that no table can hold."""
    numbers: dict[str, float] = {}
    for name in fields.keys() & {"x", "y", "mpp", "size_px"}:
        try:
            number = float(fields[name])
            number = number if name == "mpp" or number % 1 else int(number)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{source}: {name} is {fields[name]!r}, not a number") from error
        low, high = (0.01, 100) if name == "mpp" else (0, 2**31 - 1)
        if not low <= number <= high:
            raise InputError(f"{source}: {name} is {number}, not between {low} and {high}")
        if name != "mpp" and number % 1:
            raise InputError(f"{source}: {name} is {fields[name]!r}, not a whole number")
        numbers[name] = number
    return numbers


def pattern_patient(pattern: str, name: str) -> str:
    """What --patient-pattern finds: its group `patient`, else its first group, else all of it.

    raises  InputError where it finds nothing
    """
    found = re.search(pattern, name)
    group = "patient" if found and "patient" in found.groupdict() else 1
    patient = found and (found[group] if found.re.groups else found[0])
    if not patient:
        raise InputError(f"--patient-pattern {pattern!r} finds no patient in {name!r}; mend it")
    return str(patient)


def check_class_names(labels: Iterable[str | None], where: object) -> tuple[str, ...]:
    """Notes for people on labels that say there is none.

    raises  InputError for two classes whose names differ in case, spaces, - or _ alone
    """
    counts = Counter(label for label in labels if label)
    if alike := alike_names(counts):
        told = " and ".join(f"{name!r} ({counts[name]:,})" for name in alike)
        raise InputError(
            f"{where}: classes {told} would be two, and differ in case, spaces, - or _ alone; give "
            "them one name"
        )
    return tuple(
        f"label {word!r} ({count:,}) is taken for a class; where it means none, leave it empty or "
        "take those out"
        for word, count in counts.items()
        if word.casefold() in NO_CLASS
    )


def parse_shares(text: str) -> dict[str, float]:
    """Splits and shares of `train=0.8,val=0.1,test=0.1`; InputError unless they add up to 1."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        shares = {name.strip(): float(share) for name, share in pairs}
    except ValueError as error:
        raise InputError(f"split shares {text!r} are not like train=0.8,val=0.2") from error
    if min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise InputError(f"split shares {text!r}: positive, and 1 together")
    return shares


def split_patients(
    names: Iterable[str],
    shares: dict[str, float],
    seed: int,
    hide: Callable[[str], str] = str,
) -> dict[str, str]:
    """Split of every patient: no patient in two.

    Patients are ordered by a hash of (seed, name) and cut: the same splits on every machine.
    hide  what stands for a name in that hash, so that a split tells nobody which patients it has
    """
    patients = sorted(set(names), key=lambda name: key_of("split", seed, hide(name)))
    ends = np.rint(np.cumsum(list(shares.values())) * len(patients)).astype(int).tolist()
    return {
        patient: name
        for name, start, end in zip(shares, [0, *ends], ends, strict=False)
        for patient in patients[start:end]
    }


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


def check_masks_apart(root: Path, paths: Sequence[str], first: str = "") -> None:
    """Refuse a folder of pictures beside one of their masks, which would be a class of patches.

    first  what has to be done before the folders can be passed
    """
    beside: dict[str, set[str]] = {}  # folders of pictures or masks, by the one above them
    for folder in {path.rpartition("/")[0] for path in paths}:
        above, name = held_in(folder)
        beside.setdefault(above, set()).add(name)
    for above, names in beside.items():
        holders = sorted(name for name in names if name.lower() in HOLDERS)
        for pictures, masks in itertools.product(holders, sorted(names - {*holders, ""})):
            ours, theirs = (stems_in(f"{above}{name}/", paths) for name in (pictures, masks))
            if 2 * len(ours & theirs) > min(len(ours), len(theirs)):
                where = root / above
                raise InputError(
                    f"{where}: {masks}/ has files of the same names as {pictures}/ (first: "
                    f"{min(ours & theirs)}), as masks have, which are no patches; {first}pass "
                    f"{where / pictures}, and --masks {where / masks} where they are to be kept"
                )


def held_in(folder: str) -> tuple[str, str]:
    """The uppermost folder in a path that only holds pictures or masks, behind what is above it."""
    parts = folder.split("/")
    place = next(
        (p for p, name in enumerate(parts) if name.lower() in MASK_FOLDERS | HOLDERS), None
    )
    return ("", "") if place is None else ("".join(f"{n}/" for n in parts[:place]), parts[place])


def stems_in(folder: str, paths: Sequence[str]) -> set[str]:
    """Paths below a folder without their suffixes, and without what names a mask."""
    below = (PurePosixPath(path[len(folder) :]) for path in paths if path.startswith(folder))
    return {str(path.with_name(MASK_SUFFIX.sub("", path.stem))) for path in below}
