"""Versions of what is installed and what each extra still lacks, from the packages' metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from latentds_tools.health.finding import Finding, finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "latentds"
REINSTALL = "pip install latentds, or 'pip install .' in a checkout, into this Python"
FOR_DEVELOPERS = ("dev", "all")  # extras that no user of the library lacks


def examine_installed() -> Iterator[Finding]:
    """Python, latentds, its base requirements with versions, and its extras."""
    python = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    yield finding("base", "python", python)
    try:
        requirements = read_requirements()
    except importlib.metadata.PackageNotFoundError:
        yield base_problem(PACKAGE, "not installed: Python knows no metadata of it", REINSTALL)
        return
    except ImportError as error:
        yield base_problem(str(error.name), "not installed", f"pip install {error.name}")
        return
    yield finding("base", PACKAGE, importlib.metadata.version(PACKAGE))
    for requirement in requirements:
        if is_wanted(requirement, ""):
            name, lack = requirement.name, lack_of(requirement)
            if lack:
                yield base_problem(name, lack, f"pip install '{name}{requirement.specifier}'")
            else:
                yield finding("base", name, str(installed_version(name)))
    yield from examine_extras(requirements)


def read_requirements() -> list[Requirement]:
    """What latentds says it needs, its references to itself ('all') left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    return [requirement for requirement in found if requirement.name != PACKAGE]


def examine_extras(requirements: list[Requirement]) -> Iterator[Finding]:
    """A finding an extra: its packages with versions, or those that are missing."""
    metadata = importlib.metadata.metadata(PACKAGE)
    for extra in metadata.get_all("Provides-Extra") or ():
        wanted = [r for r in requirements if is_wanted(r, extra) and not is_wanted(r, "")]
        if extra in FOR_DEVELOPERS or not wanted:
            continue
        lacks = [f"{one.name} {lack}" for one in wanted if (lack := lack_of(one))]
        here = [f"{one.name} {installed_version(one.name)}" for one in wanted if not lack_of(one)]
        text, remedy = ", ".join(lacks or here), f"pip install 'latentds[{extra}]'"
        yield finding("extras", extra, text, "missing" if lacks else "", remedy)


def is_wanted(requirement: Requirement, extra: str) -> bool:
    """Whether this Python and system need it for an extra; "" asks for the base."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def lack_of(requirement: Requirement) -> str:
    """What is wrong with a package, in words; empty where it fits."""
    version = installed_version(requirement.name)
    if version is None:
        return "not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{version} is not {requirement.specifier}"
    return ""


def installed_version(name: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def base_problem(name: str, text: str, remedy: str) -> Finding:
    """Something the base install cannot do without."""
    return finding("base", name, text, "problem", remedy, is_base=True)
