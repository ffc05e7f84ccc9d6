"""Originals: the pictures a data set's patches were cut from, read again patch by patch."""
# N patches, H W pixels

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentds.errors import ContractError, InputError, UnusableError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.opening import open_source
from latentds.sources.picture import Header, Picture
from latentds.sources.picture_files import read_picture
from latentds.sources.source import PatchReader, of_file
from latentds.store.golden import likeness_db, read_golden
from latentds.store.open_files import LocalFiles
from latentds.store.patch_record import Patch
from latentds.store.reader import ShardSet
from latentds.store.slide_records import read_slide_records

LOCATED_KEPT = 65_536  # patches of which header and region are kept
GOLDEN_DB = 30.0  # thumbnails of the same patch are equal; of another one they are some 10-15 dB
Place = tuple[str, int, int]  # source, x, y; -1 where x and y are unknown


class Originals:
    """Pixels of a data set's patches, from the input that it was converted from.

    shards     the set
    source     its input: pictures, slides, coordinates, archives, as `convert` takes them
    slides, root   as for `convert`
    anonymize  the key file, where the set was made with one
    workers    threads that read

    The options recorded in the manifest say how patches were cut. No plan is made: source, x and y
    lead to a patch. Opening lists the input, and compares the golden patches' thumbnails with the
    originals. ContractError where they differ or are not there.
    """

    def __init__(
        self,
        shards: ShardSet,
        source: Path,
        *,
        slides: Path | None = None,
        root: Path | None = None,
        anonymize: Path | None = None,
        workers: int = 4,
    ) -> None:
        self.shards, self.folder = shards, source
        self.patch_px = shards.manifest.contract.patch_px
        self.options = recorded_options(shards, source, slides, root, anonymize)
        self.source = open_source(self.options)
        hide, pictures = self.options.hide, self.source.listing().pictures
        self.pictures = with_own_mpp(shards, {hide(p.source): p for p in pictures})
        self.located = functools.lru_cache(LOCATED_KEPT)(self.locate)
        self.reader = PatchReader(self.source, workers)
        self.check_golden()

    def read(self, sources: Sequence[str], coords: np.ndarray) -> np.ndarray:
        """Pixels uint8 (N, H, W, 3) of patches by their `source` column and x, y (N, 2).

        raises  ContractError for a patch that the input does not have, InputError for one that
                cannot be read
        """
        places = [(source, int(x), int(y)) for source, (x, y) in zip(sources, coords, strict=True)]
        return np.stack(list(self.reader.pool.map(self.read_one, places)))

    def read_one(self, place: Place) -> np.ndarray:
        picture, header, region = self.located(place)
        (found,) = self.reader.read(picture, header, self.patch_px, [region])
        if isinstance(found, Patch):
            return found.image
        if isinstance(found, UnusableError) and found.reason == "changed":
            raise ContractError(
                f"{self.folder / picture.source}: {found}; not what {self.shards.folder} was "
                "converted from"
            )
        raise of_file(self.folder / picture.source, found) from found

    def locate(self, place: Place) -> tuple[Picture, Header, tuple[int, int]]:
        source, x, y = place
        picture = self.pictures.get(source)
        try:
            found = picture and self.source.locate(picture, self.patch_px, (x, y))
        except InputError as error:
            raise of_file(self.folder / source, error) from error
        if picture is None or not found:
            raise ContractError(
                f"{self.folder}: no patch at ({x}, {y}) of {source!r}, which {self.shards.folder} "
                "has; give the input it was converted from"
            )
        return picture, *found

    def check_golden(self) -> None:
        """Compare originals with the thumbnails of them that the data set keeps."""
        manifest = self.shards.manifest
        if not isinstance(self.shards.files, LocalFiles):
            return  # a remote set's golden file is not fetched for this
        folder, sha256 = self.shards.files.folder, manifest.golden_sha256
        golden = read_golden(folder, manifest.contract, manifest.patches, sha256)
        if not len(golden.rows):
            return
        table = self.shards.patches[golden.rows]
        sources = self.shards.read_columns(golden.rows, ("source",))["source"]
        images = self.read(sources, np.stack([table["x"], table["y"]], 1))
        for row, source, image, thumbnail in zip(
            golden.rows.tolist(), sources, images, golden.thumbnails, strict=True
        ):
            likeness = likeness_db(image, thumbnail)
            if likeness < GOLDEN_DB:
                raise ContractError(
                    f"{self.folder}: {source!r} differs from the golden patch at row {row} of "
                    f"{self.shards.folder} ({likeness:.1f} dB); give the input it was converted "
                    "from, unchanged"
                )


def with_own_mpp(shards: ShardSet, pictures: dict[str, Picture]) -> dict[str, Picture]:
    """Slides with the resolution that a set keeps of them: a table may have overruled files."""
    if not isinstance(shards.files, LocalFiles):
        return pictures
    records = read_slide_records(shards.files.folder)
    own = {one.source: one.mpp_level0 for one in records if one.mpp_level0 is not None}
    return {s: dataclasses.replace(p, mpp=own.get(s, p.mpp)) for s, p in pictures.items()}


def recorded_options(
    shards: ShardSet, source: Path, slides: Path | None, root: Path | None, anonymize: Path | None
) -> SourceOptions:
    """How the manifest says that patches were cut, of an input that lies at `source`."""
    recorded = shards.manifest.made.get("options")
    if not isinstance(recorded, dict):
        raise ContractError(
            f"{shards.folder}: does not record how patches were cut (imported or merged); "
            "originals cannot be found again"
        )
    if recorded.get("anonymized") and anonymize is None:
        raise ContractError(
            f"{shards.folder}: slide and source names are hashes; give the key file they were "
            "made with, --anonymize"
        )
    known = {field.name for field in dataclasses.fields(SourceOptions)}
    chosen = {name: value for name, value in recorded.items() if name in known}
    chosen["mpp_tolerance"] = recorded.get("mpp_tolerance") or 0.0  # none before it was an option
    paths = {"source": source, "slides": slides, "root": root, "anonymize": anonymize}
    options = SourceOptions(**(chosen | paths | {"labels": False}))  # no class is wanted here
    if anonymize is not None and options.key_check() != recorded.get("anonymized"):
        raise ContractError(f"{anonymize}: not the key that {shards.folder} was made with")
    return options


def pixels_of(path: Path, max_px: int) -> np.ndarray:
    """Pixels uint8 (H, W, 3) of a picture of a folder; InputError that names one of no use."""
    try:
        return read_picture(path, max_px)[0]
    except InputError as error:
        raise InputError(f"{path}: {error}; repair it or take it out of the folder") from error
