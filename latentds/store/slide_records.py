"""What is kept of every slide beside the shards: counts, a small picture of what was taken, why
the rest was not.

One Parquet file, a row a slide. It is no part of the set: the manifest does not list it, only
originals are found by it (the mpp of their level 0). `publish` sends it where that is asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from latentds.core.storage import check_regular, write_atomically
from latentds.errors import FormatError, InputError
from latentds.store.format import SLIDES_TABLE
from latentds.store.packs import decode_table, encode_table

MAX_BYTES = 1 << 30  # some 100,000 slides
JPEG = b"\xff\xd8\xff"
SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("slide", pa.string()),
        ("split", pa.string()),
        ("label", pa.string()),
        ("mpp_level0", pa.float64()),  # exact: originals are read again by it
        ("mpp", pa.float32()),
        ("size_px", pa.uint32()),
        ("tissue", pa.float32()),
        ("places", pa.uint32()),
        ("patches", pa.uint32()),
        ("left_out", pa.string()),  # a reason a line
        ("picture_jpeg", pa.binary()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlideRecord:
    """A slide of a conversion.

    source, slide   as the set has them: hashes where names are hidden
    mpp_level0, mpp of its own pixels and of its patches; None where unknown
    size_px         of a patch, in pixels of level 0
    tissue          share of the slide that is tissue, None where the rule does not tell
    places          of patches that were looked at
    patches         of them that were taken
    left_out        why the rest was not, a sentence each
    picture_jpeg    the slide's levels, small, tissue outlined and patches marked; None for none
    """

    source: str
    slide: str | None
    split: str | None = None
    label: str | None = None
    mpp_level0: float | None = None
    mpp: float | None = None
    size_px: int | None = None
    tissue: float | None = None
    places: int = 0
    patches: int = 0
    left_out: tuple[str, ...] = ()
    picture_jpeg: bytes | None = None

    @property
    def name(self) -> str:
        """The slide's name, its source's where it has none."""
        return self.slide or self.source


def write_slide_records(folder: Path, records: Sequence[SlideRecord]) -> None:
    """Put records into a set's folder, by source; none where there are none."""
    if not records:
        (folder / SLIDES_TABLE).unlink(missing_ok=True)
        return
    rows = [dataclasses.asdict(one) | {"left_out": "\n".join(one.left_out)}
            for one in sorted(records, key=lambda one: one.source)]  # fmt: skip
    write_atomically(folder / SLIDES_TABLE, encode_table(pa.Table.from_pylist(rows, schema=SCHEMA)))


def read_slide_records(folder: Path) -> list[SlideRecord]:
    """A set's records, empty where it keeps none; FormatError where the file is damaged."""
    path = folder / SLIDES_TABLE
    if not path.is_file():
        return []
    check_regular(path, str(path))
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path}: {path.stat().st_size:,} bytes; refused, remove it")
    table = decode_table(path.read_bytes(), str(path), SCHEMA, most_bytes=MAX_BYTES)
    for name in ("source", "places", "patches"):
        if table[name].null_count:
            raise FormatError(f"{path}: a row without {name}; remove the file, no patch needs it")
    found = [SlideRecord(**row | {"left_out": tuple((row["left_out"] or "").splitlines())})
             for row in table.to_pylist()]  # fmt: skip
    for record in found:
        if record.mpp_level0 is not None and not 0 < record.mpp_level0 < math.inf:
            raise FormatError(f"{path}: {record.source!r} has mpp {record.mpp_level0}; remove it")
        if record.picture_jpeg is not None and not record.picture_jpeg.startswith(JPEG):
            raise FormatError(f"{path}: the picture of {record.source!r} is no JPEG; remove it")
    return found


def join_slide_records(folders: Iterable[Path], out: Path, without: Collection[str] = ()) -> None:
    """Take the records of several sets over into the set made of them.

    A source that several have a record of keeps the last one's.

    without  names of slides that the new set has not
    """
    found = {record.source: record for folder in folders for record in read_slide_records(folder)}
    write_slide_records(out, [one for one in found.values() if one.name not in without])


def need_slide_records(folder: Path) -> list[SlideRecord]:
    """A set's records; InputError where it keeps none."""
    records = read_slide_records(folder)
    if not records:
        raise InputError(
            f"{folder}: keeps nothing of slides ({SLIDES_TABLE}); it was not made of slides, or "
            "published without --thumbnails, or converted before they were kept"
        )
    return records
