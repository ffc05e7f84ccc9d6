"""Pictures in rows: Parquet files (OpenMidnight's, Hugging Face's), data sets of Hugging Face."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from latentds.errors import InputError, UnusableError, first_words, missing_extra
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import DEFAULT_SPLIT, SPLITS, path_fields
from latentds.sources.names import COLUMNS, fields_of, name_fields, note_columns, splits_of
from latentds.sources.parquet_files import PATHS, EncodedTable, has_pictures, open_table
from latentds.sources.picture import MIXED_CHUNKS, Header, Listing, Picture
from latentds.sources.picture_files import PictureFiles, PicturesInFiles
from latentds.sources.side_tables import label_column
from latentds.sources.source import Inspection, Kept, Source

# Row groups in memory: those that the plan mixes, and as many read ahead.
GROUPS_KEPT = 2 * MIXED_CHUNKS
# hf://datasets/ORG/NAME[@REVISION]; a Path has taken one of the slashes already.
ADDRESS = re.compile(r"hf:/{1,2}datasets/([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?")
ROWS_AT_ONCE = 1000


class PictureParquet(PicturesInFiles):
    """Every *.parquet of a folder, or one. A picture's source is `file.parquet/row`.

    A row group is decompressed as a whole, so its pictures stay near each other in the order.
    """

    kind = "Parquet of encoded pictures"
    marks = frozenset({".parquet"})

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options, files)
        self.tables: dict[str, EncodedTable] = {}
        self.groups: Kept[Any] = Kept(GROUPS_KEPT)

    def table(self, file: str) -> EncodedTable:
        if file not in self.tables:
            self.tables[file] = open_table(self.root / file)
        return self.tables[file]

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        tables = [path for path in found.archives if path.lower().endswith(".parquet")]
        is_meant = bool(tables) and (found.is_folder or has_pictures(found.root))
        return cls(found.options, tables) if is_meant else None

    def listing(self) -> Listing:
        files = splits_of(self.root, list(self.files), self.options.split_folders)
        pictures = [p for file, split in files.splits.items() for p in self.rows_of(file, split)]
        if not pictures:
            raise InputError(f"{self.root}: {len(self.files)} Parquet files, no row in them")
        unused = note_columns(name for table in self.tables.values() for name in table.unused)
        notes = (*files.notes, *unused)
        return Listing(tuple(pictures), notes=notes, classes=self.class_order())

    def path_fields(self, row: Mapping[str, Any], source: str) -> dict[str, Any]:
        """What a picture's own path tells, else its source: by --name-pattern, and known rules."""
        column = next((name for name in PATHS if name in row), None)
        path = row[column] if column and isinstance(row[column], str) else source
        pattern = self.options.name_pattern
        own = name_fields(pattern, self.options.labels)(path) if pattern else {}
        return path_fields(path) | own

    def class_order(self) -> tuple[str, ...]:
        """Names of the classes by number where all files have the same, else none."""
        orders = {
            tuple(t.classes.get(label_column(t.facts) or "", ())) for t in self.tables.values()
        }
        return orders.pop() if self.options.labels and len(orders) == 1 else ()

    def rows_of(self, file: str, split: str) -> Iterator[Picture]:
        for number, row in enumerate(self.table(file).rows()):
            source, fields = f"{file}/{number}", {}
            try:
                fields = self.path_fields(row, source) | fields_of(row, self.options.labels)
            except InputError as error:
                self.broken[source] = str(error)
            yield Picture(source, split, **fields)

    def chunk(self, picture: Picture) -> str | None:
        file, row = self.row_of(picture)
        return f"{file}/{self.table(file).group_of(row)}"

    def header(self, picture: Picture) -> Header:
        header = super().header(picture)
        # Bare pixels are given to Pillow as a PPM file.
        return dataclasses.replace(header, encoding="raw") if header.encoding == "ppm" else header

    def file(self, picture: Picture) -> BinaryIO:
        file, row = self.row_of(picture)
        table = self.table(file)
        number = table.group_of(row)
        group = self.groups.get(f"{file}/{number}", lambda: table.read_group(number))
        return io.BytesIO(table.picture_in(group, row - table.starts[number]))


def hub_id(source: Path) -> tuple[str, str | None] | None:
    """Id and revision where an input is hf://datasets/ORG/NAME[@REVISION], else None."""
    match = ADDRESS.fullmatch(source.as_posix())
    return (match[1], match[2]) if match else None


class DatasetPart(NamedTuple):
    """A part of a data set: its rows, and just their images, not decoded."""

    rows: Any
    images: Any


class SavedDataset(PictureFiles):
    """A folder made by `save_to_disk`. A picture's source is `split/row`."""

    kind = "a Hugging Face data set (save_to_disk)"
    marks = frozenset({".json"})

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        self.parts: Kept[dict[str, DatasetPart]] = Kept(1)

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        root = found.root
        is_one = (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
        is_saved = is_one or (root / "dataset_dict.json").is_file()
        return cls(found.options) if is_saved else None

    def load(self) -> Any:
        import datasets

        return datasets.load_from_disk(str(self.root))

    def roots(self) -> list[Path]:
        """Folders that a picture's path may lie in."""
        return [self.root]

    def load_parts(self) -> dict[str, DatasetPart]:
        try:
            import datasets
        except ImportError as error:
            raise missing_extra("datasets", "hf") from error
        import pyarrow as pa

        known = (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException)
        found = {}
        try:
            loaded = self.load()
            parts = loaded if isinstance(loaded, dict) else {DEFAULT_SPLIT: loaded}
            for name, rows in parts.items():
                column = image_column(rows, self.root)
                images = rows.select_columns([column])
                undecoded = images.cast_column(column, datasets.Image(decode=False))
                found[name] = DatasetPart(rows, undecoded)
        except (*known, datasets.exceptions.DatasetsError) as error:
            reason = first_words(error, 200)
            raise InputError(
                f"{self.root}: 'datasets' cannot load it ({type(error).__name__}: {reason}); check "
                "the name, or save it with save_to_disk and convert that folder"
            ) from error
        return found

    def listing(self) -> Listing:
        parts = self.parts.get("", self.load_parts)
        pictures = [p for name in sorted(parts) for p in self.rows_of(name, parts[name])]
        if not pictures:
            raise InputError(f"{self.root}: no row in it; name another data set")
        orders = {class_order(part.rows) for part in parts.values()}
        classes = orders.pop() if self.options.labels and len(orders) == 1 else ()
        unused = {n for part in parts.values() for n in set(part.rows.column_names) - set(COLUMNS)}
        unused -= {n for part in parts.values() for n in part.images.column_names}
        return self.named(Listing(tuple(pictures), notes=note_columns(unused), classes=classes))

    def rows_of(self, name: str, part: DatasetPart) -> Iterator[Picture]:
        split = SPLITS.get(name.lower(), name) if self.options.split_folders else DEFAULT_SPLIT
        for number, record in enumerate(records_of(part.rows)):
            source, fields = f"{name}/{number}", {}
            try:
                fields = fields_of(record, self.options.labels)
            except InputError as error:
                self.broken[source] = str(error)
            yield Picture(source, split, **fields)

    def file(self, picture: Picture) -> Path | BinaryIO:
        name, _, row = picture.source.rpartition("/")
        (image,) = self.parts.get("", self.load_parts)[name].images[int(row)].values()
        if image and image["bytes"] is not None:
            return io.BytesIO(image["bytes"])
        # A row may name any file of this machine: only the data set's own are opened.
        path = Path(image["path"]).resolve() if image and image["path"] else None
        if path is None or not any(path.is_relative_to(root.resolve()) for root in self.roots()):
            raise UnusableError(
                "has no bytes in its row, nor a file inside the data set", "missing"
            )
        return path


class HubDataset(SavedDataset):
    """A data set of the Hub by its id, through `load_dataset` and its cache; no code of it runs."""

    kind = "a Hugging Face data set by its id"
    marks = frozenset[str]()
    is_remote = True

    def __init__(self, options: SourceOptions) -> None:
        super().__init__(options)
        found = hub_id(self.root)
        assert found is not None  # that is how this source was chosen
        self.name, self.revision = found

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        return cls(found.options) if hub_id(found.root) is not None else None

    def load(self) -> Any:
        import datasets

        return datasets.load_dataset(self.name, revision=self.revision)

    def roots(self) -> list[Path]:
        import datasets

        cache = [datasets.config.HF_DATASETS_CACHE, datasets.config.HF_CACHE_HOME, self.name]
        return [Path(folder) for folder in cache]


def image_column(dataset: Any, root: Path) -> str:
    """The column of images; InputError where there is none, or several and none called image."""
    import datasets

    found = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if len(found) == 1 or "image" in found:
        return "image" if "image" in found else found[0]
    raise InputError(
        f"{root}: {len(found)} columns of images among {', '.join(dataset.features)}; cast one to "
        "datasets.Image, or call the one that is meant 'image'"
    )


def records_of(dataset: Any) -> Iterator[dict[str, Any]]:
    """What is said of every row, class numbers as names; no image is touched."""
    import datasets

    plain = (datasets.Value, datasets.ClassLabel)  # others are decoded, by whatever reads them
    names = [n for n in dataset.column_names if n in COLUMNS]
    names = [n for n in names if isinstance(dataset.features[n], plain)]
    labels = {n: dataset.features[n] for n in names if hasattr(dataset.features[n], "int2str")}
    if not names:
        yield from ({} for _ in range(len(dataset)))
        return
    for batch in dataset.select_columns(names).iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*(batch[name] for name in names), strict=True):
            record = dict(zip(names, values, strict=True))
            yield {n: label_of(labels[n], v) if n in labels else v for n, v in record.items()}


def class_order(dataset: Any) -> tuple[str, ...]:
    """Names of the classes by number, none where labels are no numbers of classes."""
    column = label_column(dataset.column_names)
    feature: Any = dataset.features[column] if column else None
    return tuple(feature.names) if hasattr(feature, "int2str") else ()


def label_of(feature: Any, number: int | None) -> str | None:
    """Name of a class number, None for -1, which stands for no label."""
    return feature.int2str(number) if number is not None and number >= 0 else None
