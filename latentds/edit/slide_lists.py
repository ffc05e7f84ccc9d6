"""Lists of slides that people keep beside a data set: names to leave out, splits of a cohort."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from latentds.core.storage import check_regular
from latentds.errors import InputError
from latentds.sources.csv_tables import read_table
from latentds.sources.field_names import columns_of
from latentds.store.format import SPLIT_PATTERN


def read_slide_list(path: Path) -> list[str]:
    """Slide names, one a line; empty lines and those that begin with # are passed over."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def read_splits(path: Path) -> tuple[Literal["slide", "patient"], dict[str, str]]:
    """What a CSV of `slide,split` or `patient,split` assigns, and which of the two it names.

    raises  InputError with the line for a missing column, a split's name that no shard can have,
            or a name in two splits
    """
    table = read_table(path)
    columns = columns_of(table, ("slide", "patient", "split"))
    by: Literal["slide", "patient"] = "slide" if "slide" in columns else "patient"
    if by not in columns or "split" not in columns:
        raise InputError(
            f"{path}: columns are {list(table.columns)}; it needs slide or patient, and split"
        )
    splits: dict[str, str] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        name, split = row[columns[by]].strip(), row[columns["split"]].strip()
        where = f"{path}, line {line}"
        if not name or not SPLIT_PATTERN.fullmatch(split):
            raise InputError(
                f"{where}: {by} {name!r}, split {split!r}; a split is a-z, 0-9 and _, up to 32"
            )
        if splits.setdefault(name, split) != split:
            raise InputError(f"{where}: {name!r} is in {splits[name]!r} too; a {by} has one split")
    return by, splits


def read_text(path: Path) -> str:
    try:
        check_regular(path, str(path))
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}); save it as such") from error
