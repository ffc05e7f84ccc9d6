"""Tars of pictures, as webdataset writes them, and tile tars, of which hs2p tells the places."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from latentds.core.display import number_of
from latentds.core.storage import parse_json, read_json
from latentds.errors import FormatError, InputError
from latentds.sources.csv_tables import read_table
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import (
    NO_LABELS,
    SPLITS,
    check_masks_apart,
    check_names,
    half_labelled,
    note_hidden,
    picture_suffixes,
    read_folders,
)
from latentds.sources.names import COLUMNS, fields_of, note_columns, numbers_of, splits_of
from latentds.sources.picture import Listing, Picture
from latentds.sources.picture_files import PicturesInFiles
from latentds.sources.slide_names import named_once, some
from latentds.sources.source import TILE_TAR, Inspection, Source
from latentds.sources.tars import TarMember, open_member, read_member, tar_members

MAX_CLS_BYTES = 4096
MAX_JSON_BYTES = 1 << 20
SIDECARS = (".cls", ".json")
# Beside <sample>.tiles.tar.
MANIFEST, META = ".tiles.manifest.csv", ".coordinates.meta.json"
TILE_COLUMNS = ("tile_index", "x", "y")
MAX_META_BYTES = 1 << 20

Members = dict[str, TarMember]
Record = dict[str, Any]  # fields of a Picture


class PictureTars(PicturesInFiles):
    """Every *.tar of a folder, or one tar. A picture's source is `archive/member`.

    Labels are KEY.cls (a number or a name) or KEY.json's, splits those of names like train-*.tar;
    where these tell none, folders inside do.
    Members that are neither are passed over, unread: pickles above all.
    """

    kind = "tars of pictures (WebDataset)"
    labels_lie = "in a .cls or .json beside each"
    marks = frozenset({".tar"})

    def __init__(self, options: SourceOptions, files: Sequence[str]) -> None:
        super().__init__(options, files)
        self.ignored = 0
        self.hidden: list[str] = []
        self.unused: set[str] = set()  # keys of records that nobody reads

    @classmethod
    def detect(cls, found: Inspection) -> Source | None:
        tars = [path for path in found.archives if path.lower().endswith(".tar")]
        return cls(found.options, tars) if tars else None

    def listing(self) -> Listing:
        archives = splits_of(self.root, list(self.files), self.options.split_folders)
        own = {archive: [*self.samples(archive, split)]
               for archive, split in archives.splits.items()}  # fmt: skip
        if not any(own.values()):
            raise InputError(
                f"{self.root}: no picture in {number_of(len(self.files), 'tar')} "
                f"({number_of(self.ignored, 'other member')}); name others"
            )
        pictures, told = self.with_folders(own, archives.are_told)
        sources = [picture.source for picture in pictures]
        check_names(self.root, sources)
        check_masks_apart(self.root, sources, "unpack the tar, then ")
        notes = (*archives.notes, *note_columns(self.unused), *told)
        notes += note_hidden(self.root, self.hidden)
        return self.named(Listing(pictures, self.ignored, notes))

    def with_folders(
        self, own: Mapping[str, Sequence[Picture]], is_split: bool
    ) -> tuple[tuple[Picture, ...], tuple[str, ...]]:
        """Pictures by archive, with what folders inside say by the rule of folders on a disk.

        A note says so, or that there are folders which tell nothing, as they lie.
        is_split  whether the archives' names tell splits: folders do where nothing else does, as
                  they tell classes
        """
        pictures, options = tuple(p for members in own.values() for p in members), self.options
        is_told = any(picture.label is not None for picture in pictures)
        is_told |= "(?P<label>" in (options.name_pattern or "")
        use_labels = options.labels and not is_told
        use_splits = options.split_folders and not is_split
        inside = [p.source[len(archive) + 1 :] for archive, members in own.items() for p in members]
        paths = below_shared(pictures, inside, use_splits, is_split)
        rule = read_folders(self.root, paths, use_labels, use_splits)
        placed = [rule.place(path) for path in paths]
        folders = {path.rpartition("/")[0] for path in paths} - {""}
        if not folders or not (use_labels or rule.has_splits):
            return pictures, ()
        names = some(sorted(folders))
        is_odd = is_split and any(path.split("/")[0].lower() in SPLITS for path in folders)
        if is_odd or (use_labels and half_labelled(placed)):
            return pictures, (f"folders inside tars are taken for no classes and splits ({names}): "
                              "--name-pattern '(?P<label>...)' reads classes, a folder with the "
                              "tars unpacked both",)  # fmt: skip
        what = ["splits"] * rule.has_splits + ["classes"] * any(place.label for place in placed)
        what += ["slides"] * (use_labels and any(place.slide for place in placed))
        told = (f"folders inside tars are taken for {' and '.join(what)} ({names}); {NO_LABELS} "
                "takes no class, --no-split-folders no split",)  # fmt: skip
        found = tuple(
            dataclasses.replace(
                picture,
                split=place.split if rule.has_splits else picture.split,
                label=place.label if use_labels else picture.label,
                slide=picture.slide or (place.slide if use_labels else None),
            )
            for picture, place in zip(pictures, placed, strict=True)
        )
        return found, (*rule.notes, *(told if what else ()))

    def samples(self, archive: str, split: str) -> Iterator[Picture]:
        members = self.members(archive)
        suffixes = picture_suffixes()
        names = [name for name in members if PurePosixPath(name).suffix.lower() in suffixes]
        kinds = suffixes | set(SIDECARS)
        others = [
            end for name in members if (end := PurePosixPath(name).suffix.lower()) not in kinds
        ]
        self.ignored += len(others)
        self.unused.update(filter(None, others))
        records = self.records(archive, members, names)
        for name in names:
            yield Picture(f"{archive}/{name}", split, **records[name], span=members[name].span)

    def members(self, archive: str) -> Members:
        """The members of an archive by name, hidden ones left out."""
        path, found = self.root / archive, {}
        for member in tar_members(path):
            if member.name in found:
                raise InputError(f"{path}, {member.name}: there twice; which of them is not said")
            if any(part.startswith(".") for part in member.name.split("/")):
                self.hidden.append(f"{archive}/{member.name}")
            else:
                found[member.name] = member
        return found

    def records(self, archive: str, members: Members, names: Sequence[str]) -> dict[str, Record]:
        """What is said of every picture of an archive."""
        path, stems = self.root / archive, {stem_of(name) for name in names}
        for name in names:
            if stem_of(name) != key_of_sample(name) and key_of_sample(name) in stems:
                raise InputError(
                    f"{path}: {name} is a second picture of sample {key_of_sample(name)!r}; keep "
                    "one a sample"
                )
        return {name: self.record(archive, members, name) for name in names}

    def record(self, archive: str, members: Members, name: str) -> Record:
        """What the members beside a picture say of it; why they cannot is kept for its header."""
        path = self.root / archive
        keys = (stem_of(name), key_of_sample(name))
        found = [members.get(f"{key}{suffix}") for suffix in SIDECARS for key in keys]
        label, facts = found[0] or found[1], found[2] or found[3]
        try:
            fields = {"label": read_label(path, label)} if label and self.options.labels else {}
            record = read_facts(path, facts) if facts else {}
            self.unused |= record.keys() - COLUMNS
            return fields | fields_of(record, self.options.labels)
        except InputError as error:
            self.broken[f"{archive}/{name}"] = str(error)
            return {}

    def file(self, picture: Picture) -> BinaryIO:
        assert picture.span is not None  # `samples` gave it one
        return open_member(self.root / self.archive_of(picture), picture.span)

    def archive_of(self, picture: Picture) -> str:
        above = (str(folder) for folder in PurePosixPath(picture.source).parents)
        return next(path for path in above if path in self.files)


def below_shared(
    pictures: Sequence[Picture], names: Sequence[str], use_splits: bool, is_split: bool
) -> list[str]:
    """Members' names below the folder that all lie in, as that is what was packed.

    use_splits  that folder is left where it has a split's name
    is_split    a folder with the name of a picture's own split, which its archive tells, says
                nothing more
    """
    parts = [name.split("/") for name in names]
    common = os.path.commonpath([name.rpartition("/")[0] for name in names])
    above = common.split("/") if common else []
    splits = [n for n, name in enumerate(above) if use_splits and name.lower() in SPLITS]
    shared = splits[0] if splits else len(above)
    below = [part[shared:] for part in parts]
    return ["/".join(part[is_split and SPLITS.get(part[0].lower()) == picture.split :])
            for picture, part in zip(pictures, below, strict=True)]  # fmt: skip


def stem_of(name: str) -> str:
    """A member's name up to its last dot: TCGA's names have dots of their own."""
    return str(PurePosixPath(name).with_suffix(""))


def key_of_sample(name: str) -> str:
    """A member's sample as webdataset has it: up to the first dot of the file's name."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def read_label(path: Path, member: TarMember) -> str:
    """The class in a KEY.cls; InputError (without the name) where it is none."""
    try:
        label = read_member(path, member, MAX_CLS_BYTES).decode().strip()
    except UnicodeDecodeError as error:
        raise InputError("its .cls is not text") from error
    return str(fields_of({"label": label or "  "}, use_labels=True)["label"])


def read_facts(path: Path, member: TarMember) -> dict[str, Any]:
    """The object in a KEY.json; InputError (without the name) where it is none."""
    try:
        facts = parse_json(read_member(path, member, MAX_JSON_BYTES), "its .json", "mend it")
    except FormatError as error:
        raise InputError("its .json cannot be read") from error
    if not isinstance(facts, dict):
        raise InputError("its .json is not an object of fields")
    return facts


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
        for annotation in dict.fromkeys(map(annotation_of, self.files)):
            own = [archive for archive in self.files if annotation_of(archive) == annotation]
            named_once(self.root, ((sample_of(archive), archive) for archive in own))
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
    table = read_table(path)
    tile, *corner = (table.need_column([name], "tiles") for name in TILE_COLUMNS)
    places: dict[str, dict[str, Any]] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        where = f"{path}, line {line}"
        if not row[tile].isdecimal():
            raise InputError(f"{where}: tile_index is {row[tile]!r}, not a number")
        place = numbers_of(where, {"x": row[corner[0]], "y": row[corner[1]]})
        if places.setdefault(f"{int(row[tile]):06d}.jpg", place) is not place:
            raise InputError(f"{where}: tile {row[tile]} is there twice")
    return places


def read_scale(path: Path) -> dict[str, Any]:
    """size_px and mpp of a slide's tiles; empty where there is no meta file.

    A tile read within hs2p's tolerance is not resampled: its mpp is not the requested one, but what
    its width at level 0 says.
    """
    if not path.is_file():
        return {}
    try:
        size, mpp = scale_of(read_json(path, MAX_META_BYTES, "make it anew"))
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
