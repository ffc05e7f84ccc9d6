"""Versions of what is installed and what each extra still lacks, from the packages' metadata."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from latentds_tools.health.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "latentds"
REINSTALL = "pip install latentds, or 'pip install .' in a checkout, into this Python"
FOR_DEVELOPERS = ("dev", "all")  # extras that no user of the library lacks


def examine_installed() -> Iterator[Finding]:
    """Python, latentds, its base requirements with versions, and its extras."""
    python = f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"
    yield Finding(group="base", name="python", state="ok", text=python)
    try:
        requirements = read_requirements()
    except importlib.metadata.PackageNotFoundError:
        yield base_problem(PACKAGE, "not installed: Python knows no metadata of it", REINSTALL)
        return
    except ImportError as error:
        yield base_problem(str(error.name), "not installed", f"pip install {error.name}")
        return
    version = importlib.metadata.version(PACKAGE)
    yield Finding(group="base", name=PACKAGE, state="ok", text=version)
    yield from examine_base(requirements)
    yield from examine_extras(requirements)


def read_requirements() -> list[Requirement]:
    """What latentds says it needs, its references to itself ('all') left out."""
    from packaging.requirements import Requirement

    found = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    return [requirement for requirement in found if requirement.name != PACKAGE]


def examine_base(requirements: list[Requirement]) -> Iterator[Finding]:
    """A finding a base requirement."""
    for requirement in requirements:
        if not is_wanted(requirement, ""):
            continue
        lack, version = lack_of(requirement), installed_version(requirement.name)
        if lack:
            yield base_problem(requirement.name, lack, f"pip install '{asked(requirement)}'")
        else:
            yield Finding(group="base", name=requirement.name, state="ok", text=str(version))


def examine_extras(requirements: list[Requirement]) -> Iterator[Finding]:
    """A finding an extra: its packages with versions, or those that are missing."""
    metadata = importlib.metadata.metadata(PACKAGE)
    for extra in metadata.get_all("Provides-Extra") or ():
        wanted = [one for one in requirements if one.marker and is_wanted(one, extra)]
        wanted = [one for one in wanted if not is_wanted(one, "")]
        if extra in FOR_DEVELOPERS or not wanted:
            continue
        lacks = [f"{one.name} {lack}" for one in wanted if (lack := lack_of(one))]
        here = [f"{one.name} {installed_version(one.name)}" for one in wanted if not lack_of(one)]
        yield Finding(
            group="extras",
            name=extra,
            state="missing" if lacks else "ok",
            text=", ".join(lacks or here),
            remedy=f"pip install 'latentds[{extra}]'" if lacks else "",
        )


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


def asked(requirement: Requirement) -> str:
    """A requirement as pip takes it, without its marker."""
    return f"{requirement.name}{requirement.specifier}"


def base_problem(name: str, text: str, remedy: str) -> Finding:
    """Something the base install cannot do without."""
    return Finding(group="base", name=name, state="problem", text=text, remedy=remedy, is_base=True)
