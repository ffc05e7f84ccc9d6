"""The errors latentds raises, one tree.

    LatentdsError
    |-- FormatError              a file is not what latentds/1 says, or is of a version this reader
    |                            does not know
    |   `-- DamagedPackError     one pack is not what was recorded; `max_bad` can replace it
    |-- ContractError            a decoder, codebook or data set that does not belong to the others
    |-- InputError               the user's images, labels or folders cannot be converted as they
    |   |                        are
    |   |-- UnusableError        one picture that cannot; its `reason` is of a closed list
    |   `-- UnreachableError     the Hub, where nothing answers
    |-- ShapeError               an array's shape does not fit (also a ValueError)
    |-- UnknownNameError         no autoencoder, split or column of that name (also a KeyError)
    |-- MissingExtraError        an optional dependency is not installed (also an ImportError)
    |-- WeightsError             weights that cannot be fetched or do not fit their network
    |-- WorkerError              a loader's worker could not hand over what it had read, or died
    `-- TooManyBadSamplesError   more unreadable inputs than `max_bad` allows

Standard ones stay standard: `FileNotFoundError`, and `ValueError` for a plainly bad argument.
"""

from __future__ import annotations

import bisect
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

COMPARED, LISTED = 1000, 40  # names of an unknown one's neighbourhood; a set has millions of keys


class LatentdsError(Exception):
    """What every error of this library is.

    The command line prints its one line and exits with 1.
    """


class FormatError(LatentdsError):
    """A file that is not what the format says, or of a version or encoding not known here."""


class DamagedPackError(FormatError):
    """One pack that cannot be read; the others can.

    shards  the set it is of
    pack    its row in the pack table
    """

    def __init__(self, message: str, shards: object = None, pack: int = -1) -> None:
        super().__init__(message)
        self.shards, self.pack = shards, pack


class ContractError(LatentdsError):
    """A decoder, a codebook or a data set that does not belong to the others."""


class InputError(LatentdsError):
    """Images, labels or folders that cannot be converted as they are."""


# Why one picture or patch is left out; what else its error says is free text.
Reason = Literal[
    "unreadable",  # bytes that cannot be opened or decoded
    "truncated",  # a file that ends too early
    "missing",  # no file, or no bytes in its row
    "too_small",
    "too_large",
    "unsupported",  # more than 8 bits, several pages, transparent: no one way to RGB
    "mask",  # its mask is missing, or not of its size
    "record",  # what is said of it beside it cannot be used
    "coordinates",  # they cannot be read, or are of another slide
    "resolution",  # not known, or coarser than asked for
    "changed",  # other than when it was listed
    "other",
]
REASONS: tuple[str, ...] = get_args(Reason)


class UnusableError(InputError):
    """One picture or patch that cannot be converted; its words do not name it."""

    def __init__(self, message: str, reason: Reason = "unreadable") -> None:
        super().__init__(message)
        self.reason: Reason = reason


class UnreachableError(InputError):
    """The Hub, which does not answer."""


class LocationError(LatentdsError):
    """A location that gives no bytes any more; no fault of the picture that was being read."""


class ShapeError(LatentdsError, ValueError):
    """An array whose shape does not fit."""


class UnknownNameError(LatentdsError, KeyError):
    """A name that is not known; the message lists the known ones."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0])


class MissingExtraError(LatentdsError, ImportError):
    """An optional dependency that is not installed."""


class WeightsError(LatentdsError):
    """Weights that cannot be fetched, or do not fit their network."""


class WorkerError(LatentdsError):
    """A loader's worker that could not hand over what it had read, or died: batches are missing."""


class TooManyBadSamplesError(LatentdsError):
    """More unreadable inputs than the budget allows."""


def no_folder(path: object, wanted: str = "folder") -> FileNotFoundError:
    """The error of a folder that is not there; of a location, with how to have one."""
    hint = ""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):  # pathlib leaves one slash of two
        hint = (
            "; loaders read locations, this reads folders: 'latentds fetch ORG/NAME --out DIR' "
            "makes one of a set on the Hub"
        )
    if Path(str(path)).is_file():
        return FileNotFoundError(f"{path}: is a file; name a folder")
    return FileNotFoundError(f"{path}: no such {wanted}{hint}")


def unopened(path: object, error: OSError) -> FormatError:
    """The error of a data set's file that cannot be opened; the right to read is no loss."""
    is_there = isinstance(error, PermissionError)
    remedy = "ask who owns it for the right to read it" if is_there else "fetch it anew"
    return FormatError(f"{path}: {error.strerror or error}; {remedy}")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """An error that names the closest known name and lists them all, of many the next ones."""
    names = sorted(known)
    near, listed = (neighbours(names, str(name), most) for most in (COMPARED, LISTED))
    close = difflib.get_close_matches(str(name), near, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    more = f", ... ({len(names):,} in all)" if len(names) > len(listed) else ""
    return UnknownNameError(
        f"unknown {kind} {name!r}{hint} known: {', '.join(listed) or 'none'}{more}"
    )


def neighbours(names: list[str], name: str, most: int) -> list[str]:
    """At most so many of the sorted names, those around `name`."""
    first = min(bisect.bisect(names, name) - most // 2, len(names) - most)
    return names[max(first, 0) :][:most]


def missing_extra(module: str, extra: str) -> MissingExtraError:
    """An error that says which extra brings `module`."""
    return MissingExtraError(f"{module} is not installed; pip install 'latentds[{extra}]'")


def first_words(error: BaseException, most: int = 120) -> str:
    """The start of an error's text, on one line; its kind where it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__
