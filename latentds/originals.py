"""Originals: the pictures a data set's patches were cut from, read again patch by patch."""
# N patches, H W pixels

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from latentds.conversion.anonymity import Anonymizer
from latentds.conversion.config import ConvertConfig
from latentds.conversion.plan import Plan, make_plan
from latentds.errors import ContractError, InputError
from latentds.files import LocalFiles
from latentds.golden import likeness_db, read_golden
from latentds.reader import ShardSet

PLACES_KEPT = 512  # pictures whose regions' places are kept by name
GOLDEN_DB = 30.0  # thumbnails of the same patch are equal; of another one they are some 10-15 dB
COLUMNS = ("source",)
Region = tuple[int, int]


class Originals:
    """Pixels of a data set's patches, from the folder that it was converted from.

    shards     the set
    source     its input: pictures, slides, coordinates, archives, as `convert` takes them
    slides, root   as for `convert`
    anonymize  the key file, where the set was made with one
    workers    threads that read

    The options recorded in the manifest say how patches were cut. Opening compares the golden
    patches' thumbnails with the originals. ContractError where they differ or are not there.
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
        self.shards, self.source = shards, source
        self.hide = Anonymizer(anonymize) if anonymize else str
        config = recorded_config(shards, source, slides, root, anonymize)
        self.plan: Plan = make_plan(config)
        if self.plan.patch_px != shards.manifest.contract.patch_px:
            raise ContractError(
                f"{source}: patches of {self.plan.patch_px} px, {shards.folder} has "
                f"{shards.manifest.contract.patch_px}; not what it was converted from"
            )
        self.numbers = {self.hide(p.source): n for n, p in enumerate(self.plan.pictures)}
        order = np.argsort(self.plan.regions["picture"], kind="stable")
        self.by_picture = self.plan.regions[order]
        self.starts = np.searchsorted(
            self.by_picture["picture"], np.arange(len(self.plan.pictures) + 1)
        )
        self.places = functools.lru_cache(PLACES_KEPT)(self.places_of)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="originals")
        self.check_golden()

    def places_of(self, number: int) -> dict[tuple[int, int], Region]:
        """Regions of a picture by the x and y that the data set records (-1 for unknown)."""
        picture, header = self.plan.pictures[number], self.plan.headers[number]
        found = {}
        for row in self.by_picture[self.starts[number] : self.starts[number + 1]]:
            region = (int(row["x"]), int(row["y"]))
            x, y = self.plan.source.origin(picture, header, region)
            found[-1 if x is None else x, -1 if y is None else y] = region
        return found

    def read(self, sources: Sequence[str], coords: np.ndarray) -> np.ndarray:
        """Pixels uint8 (N, H, W, 3) of patches by their `source` column and x, y (N, 2).

        raises  ContractError for a patch that the input does not have, InputError for one that
                cannot be read
        """
        at = [(source, int(x), int(y)) for source, (x, y) in zip(sources, coords, strict=True)]
        return np.stack(list(self.pool.map(self.read_one, at)))

    def read_one(self, at: tuple[str, int, int]) -> np.ndarray:
        """Pixels uint8 (H, W, 3) of one patch."""
        source, x, y = at
        number = self.numbers.get(source)
        region = self.places(number).get((x, y)) if number is not None else None
        if number is None or region is None:
            raise ContractError(
                f"{self.source}: no patch at ({x}, {y}) of {source!r}, which {self.shards.folder} "
                "has; give the input it was converted from"
            )
        picture, header = self.plan.pictures[number], self.plan.headers[number]
        try:
            (patch,) = self.plan.source.read(picture, header, self.plan.patch_px, [region])
        except InputError as error:
            raise InputError(f"{self.source / picture.source}: {error}") from error
        return patch.image

    def check_golden(self) -> None:
        """Compare originals with the thumbnails of them that the data set keeps."""
        manifest = self.shards.manifest
        if not isinstance(self.shards.files, LocalFiles):
            return  # a remote set's golden file is not fetched for this
        golden = read_golden(self.shards.files.folder, manifest.contract, manifest.patches)
        if not len(golden.rows):
            return
        table = self.shards.patches[golden.rows]
        sources = self.shards.read_columns(golden.rows, COLUMNS)["source"]
        images = self.read(sources, np.stack([table["x"], table["y"]], 1))
        for row, source, image, thumbnail in zip(
            golden.rows.tolist(), sources, images, golden.thumbnails, strict=True
        ):
            likeness = likeness_db(image, thumbnail)
            if likeness < GOLDEN_DB:
                raise ContractError(
                    f"{self.source}: {source!r} differs from the golden patch at row {row} of "
                    f"{self.shards.folder} ({likeness:.1f} dB); give the input it was converted "
                    "from, unchanged"
                )


def recorded_config(
    shards: ShardSet, source: Path, slides: Path | None, root: Path | None, anonymize: Path | None
) -> ConvertConfig:
    """The conversion that the manifest records, of an input that lies at `source`."""
    options = shards.manifest.made.get("options")
    if not isinstance(options, dict):
        raise ContractError(
            f"{shards.folder}: does not record how patches were cut (imported or merged); "
            "originals cannot be found again"
        )
    if options.get("anonymized") and anonymize is None:
        raise ContractError(
            f"{shards.folder}: slide and source names are hashes; give the key file they were "
            "made with"
        )
    known = {field.name for field in dataclasses.fields(ConvertConfig)}
    chosen = {name: value for name, value in options.items() if name in known}
    if chosen.get("preset") == "paper":  # its values are recorded beside it
        chosen.pop("preset")
    paths = {"source": source, "slides": slides, "root": root, "anonymize": anonymize}
    config = ConvertConfig(**{**chosen, **paths, "out": Path("originals"), "max_bad": 10**9})
    if anonymize is not None and config.key_check() != options.get("anonymized"):
        raise ContractError(f"{anonymize}: not the key that {shards.folder} was made with")
    return config
