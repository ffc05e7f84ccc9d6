"""What a conversion reads from: pictures (files, slides, archive members), and their patches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from latentds.store.patch_record import Patch, Place

MIXED_CHUNKS = 4  # pictures of so many chunks are shuffled among each other


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was found, and what its name, its folders or a table say about it.

    source       path relative to the input folder (posix), inside an archive `archive/member`
    split        train, val, test, ...
    label, slide names, None where unknown
    x, y         left and top edge of the whole picture in pixels of level 0, None where unknown
    mpp          micrometres a pixel, None where unknown
    size_px      width of the picture in pixels of level 0, None where that is its own
    mask         path of its mask relative to the input folder, None for none
    patient      name, None where it is the slide's or unknown; for splits only, stored nowhere
    span         (offset, size) of its bytes in an archive, None for a file of its own
    """

    source: str
    split: str
    label: str | None = None
    slide: str | None = None
    x: int | None = None
    y: int | None = None
    mpp: float | None = None
    size_px: int | None = None
    mask: str | None = None
    patient: str | None = None
    span: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Header:
    """What a picture says before a pixel is decoded.

    size_px     (H, W)
    mode        Pillow mode
    encoding    how it is coded, for example png or jpeg:q=75:4:2:0
    bytes       of the file
    mask_bytes  of its mask's file, 0 for none
    """

    size_px: tuple[int, int]
    mode: str
    encoding: str
    bytes: int
    mask_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Listing:
    """Pictures in a fixed order, and how many other files were passed over (with one of them).

    notes    what was assumed, and what was found and not read, in sentences without an end
    others   the files passed over
    classes  all label names in the source's own order, whose places are its numbers; else empty
    """

    pictures: tuple[Picture, ...]
    ignored: int = 0
    ignored_example: str = ""
    notes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


class Source(Protocol):
    """Where patches come from.

    `header`, `regions` and `read` are called from several threads; pickled, it can still `read`.
    """

    @property
    def kind(self) -> str:
        """In words, for the user: what was found in the input."""
        ...

    notes: tuple[str, ...]  # what its kind assumes

    def listing(self) -> Listing:
        """All pictures; InputError where there are none or they contradict each other."""
        ...

    def chunk(self, picture: Picture) -> str | None:
        """What must be read as a whole to reach a picture, None where each stands for itself.

        The order keeps pictures of MIXED_CHUNKS chunks together, so that each is read once.
        """
        ...

    def header(self, picture: Picture) -> Header:
        """Size and coding; InputError (without the name) where it cannot be converted."""
        ...

    def file(self, picture: Picture) -> Path | BinaryIO:
        """A picture's bytes: a path, or an open member of an archive.

        InputError (without the name) where there are none.
        """
        ...

    def mask_file(self, picture: Picture, size_px: tuple[int, int]) -> Path | None:
        """A picture's mask, None where there is none; InputError for one that is lost or bad."""
        ...

    def patch_px(self, headers: dict[str, Header]) -> tuple[int, int]:
        """(H, W) of all patches, from the headers by source; InputError where none fits all."""
        ...

    def regions(self, picture: Picture, header: Header, patch_px: tuple[int, int]) -> np.ndarray:
        """int32 (n, 2): x and y of the picture's patches, in its own pixels."""
        ...

    def empty_reason(self, picture: Picture) -> str:
        """Why a picture has no regions."""
        ...

    def whereabouts(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
    ) -> list[Place]:
        """What `read` will record of where the patches at regions lie, without reading a pixel."""
        ...

    def lookup(self, source: str) -> Picture | None:
        """A picture by its source, enough to `locate` and `read` its patches.

        None where it is not there, or where only a listing tells.
        """
        ...

    def locate(
        self, picture: Picture, patch_px: tuple[int, int], place: tuple[int, int]
    ) -> tuple[Header, tuple[int, int]] | None:
        """Header and region of the patch that `read` records at x and y (-1 for unknown).

        None where the picture has none; InputError (without the name) as from `header`.
        """
        ...

    def read(
        self,
        picture: Picture,
        header: Header,
        patch_px: tuple[int, int],
        regions: Sequence[tuple[int, int]],
    ) -> list[Patch]:
        """The patches at regions; InputError (without the name) where it cannot be decoded."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the manifest is to say about the input besides the options; no path, no name."""
        ...
