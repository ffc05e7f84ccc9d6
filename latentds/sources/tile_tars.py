"""Tile tars of hs2p and slide2vec: <sample>.tiles.tar and, beside it, the places of its tiles."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from latentds.core.json_text import parse_json
from latentds.errors import FormatError, InputError
from latentds.sources.image_folder import numbers_of
from latentds.sources.picture import Listing
from latentds.sources.picture_tars import Members, PictureTars, Record
from latentds.sources.source import TILE_TAR, Inspection, Source

MANIFEST = ".tiles.manifest.csv"
META = ".coordinates.meta.json"
COLUMNS = ("tile_index", "x", "y")
MAX_MANIFEST_BYTES = 1 << 28  # about 12 M tiles; a slide has some 100 k at most
MAX_META_BYTES = 1 << 20


class TileTars(PictureTars):
    """tiles/[annotation/]<sample>.tiles.tar: the slide is the sample, the annotation its class.

    x and y are the manifest's, in pixels of level 0; size_px and mpp the meta file's, where it is.
    """

    kind = "tile tars of hs2p or slide2vec"

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        tars = [path for path in found.archives if path.endswith(TILE_TAR)]
        return cls(found.options, tars) if tars else None

    def listing(self) -> Listing:
        first: dict[tuple[str, str | None], str] = {}
        for archive in self.files:
            sample = (sample_of(archive), annotation_of(archive))
            other = first.setdefault(sample, archive)
            if other != archive:
                raise InputError(
                    f"{self.root}: {other} and {archive} are both slide {sample[0]!r}; rename or "
                    "remove one"
                )
        return super().listing()

    def records(self, archive: str, members: Members, names: Sequence[str]) -> dict[str, Record]:
        del members
        path = self.root / archive
        places = read_places(path.with_name(f"{sample_of(archive)}{MANIFEST}"))
        if set(names) != places.keys():
            odd = min(set(names) ^ places.keys())
            raise InputError(
                f"{path}: {len(names)} tiles, its manifest has {len(places)} (first that is in one "
                f"only: {odd}); make both anew"
            )
        shared = {"slide": sample_of(archive)} | read_scale(
            path.with_name(f"{sample_of(archive)}{META}")
        )
        annotation = annotation_of(archive)
        if annotation and self.options.labels:
            shared["label"] = annotation
        return {name: shared | places[name] for name in names}


def sample_of(archive: str) -> str:
    return PurePosixPath(archive).name.removesuffix(TILE_TAR)


def annotation_of(archive: str) -> str | None:
    """The folder between tiles/ and a tile tar, None where it lies in tiles/ itself."""
    *above, folder = ("tiles", *PurePosixPath(archive).parts[:-1])
    return folder if above and above[-1] == "tiles" and folder != "tiles" else None


def read_places(path: Path) -> dict[str, dict[str, Any]]:
    """x and y of every tile by its member's name; InputError where the manifest cannot be used."""
    if not path.is_file():
        raise InputError(f"{path}: not there; the places of the tiles are in it")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes; no slide has so many tiles")
    places: dict[str, dict[str, Any]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                name, place = read_row(f"{path}, row {number}", row)
                if places.setdefault(name, place) is not place:
                    raise InputError(
                        f"{path}, row {number}: tile {row['tile_index']} is there twice"
                    )
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a table ({error}); make it anew") from error
    return places


def read_row(where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if any(row.get(name) is None for name in COLUMNS):
        raise InputError(f"{where}: needs {', '.join(COLUMNS)}")
    if not row["tile_index"].isdecimal():
        raise InputError(f"{where}: tile_index is {row['tile_index']!r}, not a number")
    return f"{int(row['tile_index']):06d}.jpg", numbers_of(where, {n: row[n] for n in ("x", "y")})


def read_scale(path: Path) -> dict[str, Any]:
    """size_px and mpp of a slide's tiles; empty where there is no meta file.

    A tile read within hs2p's tolerance is not resampled: its mpp is not the requested one, but what
    its width at level 0 says.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_META_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes; no description of tiles")
    try:
        size, mpp = scale_of(parse_json(path.read_bytes(), str(path), "make it anew"))
    except (FormatError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{path}: not hs2p's ({type(error).__name__}: {error}); make it anew, or remove it"
        ) from error
    return numbers_of(str(path), {"size_px": str(size), "mpp": str(mpp)})


def scale_of(meta: dict[str, Any]) -> tuple[int, float]:
    """Width of a tile at level 0 and its mpp; KeyError and the like where a meta file has none.

    hs2p's first versions have no sections and call the request a target.
    """
    tiling = meta.get("tiling", meta)
    size, base = int(tiling["tile_size_lv0"]), meta.get("slide", {}).get("base_spacing_um")
    asked = "requested" if "requested_tile_size_px" in tiling else "target"
    tile = tiling[f"{asked}_tile_size_px"]
    if base is not None:
        return size, base * size / tile
    if "read_tile_size_px" in tiling:
        return size, tiling["read_spacing_um"] * tiling["read_tile_size_px"] / tile
    return size, tiling[f"{asked}_spacing_um"]
