"""What names say: TCGA barcodes, splits of patients."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from latentds.errors import InputError
from latentds.randomness import key_of

TCGA_PATIENT = re.compile(r"(TCGA-[0-9A-Z]{2}-[0-9A-Z]{4})(?:-|$)")
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


def patient_of(slide: str) -> str:
    """Patient of a slide: the first three parts of a TCGA barcode, else the slide itself."""
    found = TCGA_PATIENT.match(slide)
    return found[1] if found else slide


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
    slides: Iterable[str],
    shares: dict[str, float],
    seed: int,
    hide: Callable[[str], str] = str,
) -> dict[str, str]:
    """Split of every patient: no patient in two.

    Patients are ordered by a hash of (seed, name) and cut: the same splits on every machine.
    hide  what stands for a name in that hash, so that a split tells nobody which patients it has
    """
    patients = sorted(
        {patient_of(slide) for slide in slides}, key=lambda name: key_of("split", seed, hide(name))
    )
    ends = np.rint(np.cumsum(list(shares.values())) * len(patients)).astype(int).tolist()
    return {
        patient: name
        for name, start, end in zip(shares, [0, *ends], ends, strict=False)
        for patient in patients[start:end]
    }


def describe_barcodes(slides: Iterable[str], projects: Mapping[str, str]) -> dict[str, Any]:
    """What the TCGA barcodes among slide names say together; empty where there are none.

    projects  project by patient (TCGA-3C-AALI), slide or tissue source site (3C)
    """
    found = [code for name in slides if (code := parse_barcode(name)) is not None]
    if not found:
        return {}
    counts: dict[str, int] = {}
    for code in found:
        keys = (code.slide, code.patient, code.site)
        project = next((projects[key] for key in keys if key in projects), None)
        if project is not None:
            counts[project] = counts.get(project, 0) + 1
    return {
        "patients": len({code.patient for code in found}),
        "samples": len({code.sample for code in found}),
        "slides": len({code.slide for code in found}),
        "frozen_slides": sum(code.is_frozen for code in found),
        "projects": dict(sorted(counts.items())),
    }
