"""Pictures listed in a table (CSV, TSV, Parquet), and SAM-Path's img/ mask/ csv folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from latentds.conversion.config import ConvertConfig
from latentds.display import csv_text
from latentds.errors import InputError, unknown_name
from latentds.opening import check_regular
from latentds.sources.image_folder import DEFAULT_SPLIT, SPLITS, check_labels, numbers_of, walk
from latentds.sources.picture_files import PictureFiles
from latentds.sources.pictures import MASK_SUFFIXES, picture_suffixes
from latentds.sources.source import Listing, Picture

TABLES = {".csv", ".tsv", ".parquet"}
COLUMNS = ("path", "label", "slide", "patient", "x", "y", "mpp", "size_px", "split", "mask")
ALIASES = {  # what tables of bags and of cases call them
    "slide_id": "slide",
    "bag": "slide",
    "patient_id": "patient",
    "case_id": "patient",
    "tma_core": "patient",
}
MAX_TABLE_BYTES = 1 << 34
# SAM-Path's folds: -1 is the test set, 0 validation, the others training.
FOLDS = {"-1": "test", "0": "val"}


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table as texts and numbers, empty cells left out."""
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    check_regular(path, str(path))
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes; more than a table of pictures has")
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
        else:
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            names = pc.open_csv(
                path, parse_options=pc.ParseOptions(delimiter=separator)
            ).schema.names
            # Everything as text: a slide called 0012 is not number 12.
            types = pc.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
            table = pc.read_csv(
                path, parse_options=pc.ParseOptions(delimiter=separator), convert_options=types
            )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a table ({' '.join(str(error).split())[:120]})") from error
    return [
        {
            name: csv_text(value) if isinstance(value, str) else value
            for name, value in row.items()
            if value is not None and value != ""
        }
        for row in table.to_pylist()
    ]


def is_table(path: Path) -> bool:
    """Whether an input is a table file."""
    return path.is_file() and path.suffix.lower() in TABLES


class PictureTable(PictureFiles):
    """A table with a column `path`; also label, slide, patient, x, y, mpp, size_px, split, mask.

    Paths start from --root, by default the table's folder, and may not lead out of it.
    """

    kind = "a table of pictures"

    def __init__(self, config: ConvertConfig) -> None:
        super().__init__(config)
        self.table, self.root = config.source, config.root or config.source.parent

    def listing(self) -> Listing:
        rows = read_table(self.table)
        if not rows:
            raise InputError(f"{self.table}: no rows")
        rows = [self.renamed(row) for row in rows]
        for name in {name for row in rows for name in row}:
            if name not in COLUMNS:
                raise unknown_name(f"column of {self.table}", name, COLUMNS)
        pictures = tuple(self.picture(number, row) for number, row in enumerate(rows, 1))
        check_labels(self.table, pictures, self.config.labels)
        return Listing(pictures)

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the names used here; InputError where two columns are one."""
        found = {ALIASES.get(name, name): value for name, value in row.items()}
        if len(found) < len(row):
            raise InputError(f"{self.table}: {', '.join(row)}: two columns are one; drop one")
        return found

    def picture(self, number: int, row: dict[str, Any]) -> Picture:
        """The picture a row names."""
        where = f"{self.table}, row {number}"
        if "path" not in row:
            raise InputError(f"{where}: no path")
        split = str(row.get("split", DEFAULT_SPLIT))
        texts: dict[str, Any] = {
            n: str(row[n]) for n in ("label", "slide", "patient") if n in row and self.keeps(n)
        }
        numbers: dict[str, Any] = numbers_of(where, {n: str(v) for n, v in row.items()})
        return Picture(
            self.inside(str(row["path"]), where),
            SPLITS.get(split.lower(), split),
            **texts,
            **numbers,
            mask=self.inside(str(row["mask"]), where) if "mask" in row else None,
        )

    def keeps(self, column: str) -> bool:
        """Whether a column is wanted."""
        return column != "label" or self.config.labels

    def inside(self, path: str, where: str) -> str:
        """A path below the root as posix; InputError where it leads out."""
        full = Path(path)
        if full.is_absolute() and full.is_relative_to(self.root.resolve()):
            full = full.relative_to(self.root.resolve())
        if full.is_absolute() or ".." in full.parts:
            raise InputError(
                f"{where}: {path} lies outside {self.root}; pass --root with a folder that holds "
                "all pictures"
            )
        return full.as_posix()


def is_sampath(root: Path) -> bool:
    """Whether a folder has SAM-Path's layout."""
    return (root / "img").is_dir() and (root / "mask").is_dir()


class SamPathFolder(PictureFiles):
    """img/NAME, mask/NAME.png and a CSV (img_id, fold): fold -1 is test, 0 val, others train."""

    kind = "img/, mask/ and a CSV of folds (SAM-Path's layout)"

    def listing(self) -> Listing:
        images, masks = list(walk(self.root / "img")), list(walk(self.root / "mask"))
        suffixes = picture_suffixes()
        found = [p for p in images if PurePosixPath(p).suffix.lower() in suffixes]
        by_stem = {
            str(PurePosixPath(p).with_suffix("")): p
            for p in masks
            if PurePosixPath(p).suffix.lower() in MASK_SUFFIXES
        }
        folds = dict(self.folds())
        pictures = []
        for path in found:
            stem = str(PurePosixPath(path).with_suffix(""))
            if stem not in by_stem:
                raise InputError(f"{self.root}: img/{path} has no mask/{stem}.png")
            fold = folds.get(path, folds.get(stem))
            if folds and fold is None:
                raise InputError(f"{self.root}: img/{path} is in no row of the CSV of folds")
            split = DEFAULT_SPLIT if fold is None else split_of_fold(fold, self.root)
            pictures.append(Picture(f"img/{path}", split, mask=f"mask/{by_stem[stem]}"))
        if not pictures:
            raise InputError(f"{self.root}/img: no pictures in it")
        return Listing(tuple(pictures), len(images) - len(found))

    def folds(self) -> Iterator[tuple[str, str]]:
        """Picture (with or without suffix) and fold, of the only CSV there."""
        tables = sorted(self.root.glob("*.csv"))
        if len(tables) > 1:
            raise InputError(f"{self.root}: {tables[0].name} and {tables[1].name}; keep one CSV")
        for number, row in enumerate(read_table(tables[0]) if tables else [], 1):
            if "img_id" not in row or "fold" not in row:
                raise InputError(f"{tables[0]}, row {number}: needs img_id and fold")
            yield str(row["img_id"]), str(row["fold"])


def split_of_fold(fold: str, where: Path) -> str:
    """Split of a fold, a number (pandas writes -1.0 for -1) or a split's name."""
    if fold.lower() in SPLITS:
        return SPLITS[fold.lower()]
    try:
        number = float(fold)
    except ValueError as error:
        raise InputError(f"{where}: fold {fold!r} is no number") from error
    if number < -1 or number != int(number):
        raise InputError(f"{where}: fold {fold!r}; -1 is test, 0 val, others train")
    return FOLDS.get(str(int(number)), DEFAULT_SPLIT)


def apply_splits(pictures: tuple[Picture, ...], path: Path) -> tuple[Picture, ...]:
    """The pictures with the splits (and labels) that a CSV gives their slide or patient."""
    from latentds.sources.names import parse_barcode, patient_of

    given: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_table(path), 1):
        name = row.get("slide", row.get("patient"))
        if name is None or "split" not in row:
            raise InputError(f"{path}, row {number}: needs slide or patient, and split")
        if given.setdefault(str(name), row) != row:
            raise InputError(f"{path}, row {number}: {name} is there twice, in different ways")
    changed = []
    for picture in pictures:
        slide = picture.slide or ""
        barcode = parse_barcode(slide)
        short = barcode.slide if barcode else slide  # without the UUID that file names carry
        names = (slide, short, picture.patient, patient_of(slide))
        found = next((given[name] for name in names if name in given), None)
        if found is None:
            raise InputError(f"{path}: names neither slide {picture.slide!r} nor its patient")
        split = str(found["split"])
        label = str(found["label"]) if "label" in found else picture.label
        changed.append(
            dataclasses.replace(picture, split=SPLITS.get(split.lower(), split), label=label)
        )
    return tuple(changed)
