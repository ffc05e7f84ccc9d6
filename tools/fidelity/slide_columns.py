"""Tables that say which slide a picture is of: CSV files with a path and a slide in every line."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from latentds.core.untrusted_files import check_regular
from latentds.errors import InputError

OWN = "labels.csv"  # in a folder of pictures
PICTURES = ("path", "name", "file", "filename")
SLIDES = ("slide", "tma_core", "patient")  # the first that is there


@dataclasses.dataclass(frozen=True, eq=False)
class SlideColumns:
    """Slides by picture.

    name    of the file
    column  that its slides are from
    slides  slide by a path's end (class/1.png) or by a name without its suffix
    """

    name: str
    column: str
    slides: dict[str, str]

    def slide_of(self, path: Path) -> str | None:
        """The slide of a picture: of the line with the longest end of its path, None for none."""
        parts = path.absolute().parts[1:]
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        for end in (*ends, path.stem):
            if end in self.slides:
                return self.slides[end]
        return None


def read_table(path: Path) -> SlideColumns:
    """A table; InputError where it has not the columns, or says two things of one picture."""
    try:
        check_regular(path, str(path))
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            picture = next((name for name in PICTURES if name in columns), None)
            slide = next((name for name in SLIDES if name in columns), None)
            if picture is None or slide is None:
                raise InputError(
                    f"{path}: needs a column of {', '.join(PICTURES)} and one of "
                    f"{', '.join(SLIDES)}; it has {', '.join(columns)[:100] or 'none'}"
                )
            slides: dict[str, str] = {}
            for row in reader:
                key = (row[picture] or "").replace("\\", "/").removeprefix("./").lstrip("/")
                if not key or not row[slide]:
                    raise InputError(f"{path}: line {reader.line_num} lacks a picture or a slide")
                if slides.setdefault(key, row[slide]) != row[slide]:
                    raise InputError(f"{path}: two slides for {key}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    return SlideColumns(path.name, slide, slides)


def own_table(folder: Path) -> SlideColumns | None:
    """The labels.csv of a folder, None where there is none or it says nothing of slides."""
    path = folder / OWN
    if not path.is_file():
        return None
    try:
        return read_table(path)
    except InputError:
        return None  # labels of something else
