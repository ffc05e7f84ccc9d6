"""What lies in an input, looked at once for all sources that may be meant."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path, PurePosixPath

from latentds.errors import InputError
from latentds.sources.cut_options import SourceOptions
from latentds.sources.image_folder import walk
from latentds.sources.kinds import Choice, Kinds, choose, sort_files
from latentds.sources.parquet_files import has_pictures
from latentds.sources.picture_decoding import picture_suffixes
from latentds.sources.tars import tar_members

TILE_TAR = ".tiles.tar"  # hs2p's and slide2vec's
ARCHIVES = (".tar", ".parquet")
LOOK_AT = 20  # members, before it is settled that a tar is none of pictures


class Inspection:
    """An input as a source's `detect` sees it; what costs a look at all files is looked at once."""

    def __init__(self, options: SourceOptions) -> None:
        self.options, self.root = options, options.source

    @functools.cached_property
    def is_folder(self) -> bool:
        """Whether the input is a folder."""
        return self.root.is_dir()

    @functools.cached_property
    def is_file(self) -> bool:
        """Whether the input is a file."""
        return self.root.is_file()

    @property
    def is_open(self) -> bool:
        """Whether it is a folder whose files alone say what it is, no --kind."""
        return self.is_folder and self.options.kind is None

    @functools.cached_property
    def paths(self) -> list[str]:
        """Files of a folder, by name."""
        return list(walk(self.root))

    @functools.cached_property
    def suffixes(self) -> set[str]:
        """How the input, or the files of its folder, are named, in small letters."""
        names = self.paths if self.is_folder else [self.root.name]
        return {os.path.splitext(name)[1].lower() for name in names}  # noqa: PTH122  # of many

    @functools.cached_property
    def kinds(self) -> Kinds:
        """A folder's files by kind."""
        return sort_files(self.root, self.paths)

    @functools.cached_property
    def choice(self) -> Choice:
        """Whether a folder is one of slides; InputError where it holds slides and pictures."""
        return choose(self.root, self.kinds)

    @functools.cached_property
    def archives(self) -> tuple[str, ...]:
        """Archives of pictures: the input itself, or a folder's; InputError for pictures beside.

        What else lies in a folder of slides is left alone.
        """
        if self.is_file:
            return (self.root.name,) if is_archive(self.root.name) else ()
        if not self.is_open:
            return ()
        found = tuple(path for path in self.paths if is_archive(path))
        if any(path.endswith(TILE_TAR) for path in found):
            return found  # hs2p puts previews and masks beside its tars
        pictures = [*self.kinds.pictures, *self.kinds.unsure]
        if not found or self.kinds.slides or not pictures:
            return () if self.kinds.slides else found
        mixed = next((path for path in found if holds_pictures(self.root / path)), None)
        if mixed is not None:
            raise InputError(
                f"{self.root}: holds pictures ({pictures[0]}) and archives of pictures ({mixed}); "
                "name the one that is meant, or move the other"
            )
        return ()


def is_archive(path: str) -> bool:
    """Whether a file is named as an archive of pictures may be."""
    return PurePosixPath(path).suffix.lower() in ARCHIVES


def holds_pictures(path: Path) -> bool:
    """Whether a tar's first members, or a Parquet file's columns, are pictures among others.

    A damaged one has none.
    """
    if path.suffix.lower() == ".parquet":
        return has_pictures(path)
    try:
        first = [member.name for member in itertools.islice(tar_members(path), LOOK_AT)]
    except InputError:
        return False
    return any(PurePosixPath(name).suffix.lower() in picture_suffixes() for name in first)
