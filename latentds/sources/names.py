"""What names say by a pattern of the user's, the numbers in them, and splits of patients."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from latentds.core.randomness import key_of
from latentds.errors import InputError
from latentds.sources.image_folder import known_patient


def patient_of(slide: str) -> str:
    """Patient of a slide where its name has one of the known schemes, else the slide itself."""
    found = known_patient(slide)
    return found[1] if found else slide


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
