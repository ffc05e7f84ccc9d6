"""Repack a data set: other packs, order, splits, slides left out, and, if wished, other codes."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from latentds.conversion.workdir import stored_bytes
from latentds.core.display import number_of, progress
from latentds.core.storage import check_room, write_atomically
from latentds.edit.outputs import check_new, local_folder, new_data_set
from latentds.edit.recoding import Recoder, Recoding
from latentds.errors import InputError, unknown_name
from latentds.sources.picture import Picture
from latentds.sources.picture_tables import SlideTable, apply_slide_table
from latentds.store.composing import SHARD_BYTES, Composer, Part, complete
from latentds.store.format import GOLDEN, PATCHES, SPLIT_PATTERN
from latentds.store.golden import read_golden_table, renumbered
from latentds.store.manifest import Manifest
from latentds.store.packs import MASK_SCHEMA, SCHEMA, decode_table, encode_table
from latentds.store.reader import ShardSet
from latentds.store.slide_records import join_slide_records, read_slide_records

logger = logging.getLogger(__name__)
# Arrow's own strings end at 2 GB a column, which some 30 million source paths fill.
LARGE = pa.schema(
    [(field.name, pa.large_string() if field.name == "source" else field.type) for field in SCHEMA]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repacking:
    """What is to be different.

    pack_size       patches a pack
    group_by        "slide": all patches of a slide as one pack, slides by name
    order           "shuffle" by the seed, "path" (by source path, then y and x), "stored"
    exclude_slides  names of slides whose patches are left out
    splits          split of every slide or patient, instead of the old ones
    shard_bytes     of codes a shard
    recoding        other codes, made of the stored latents; None keeps every code
    """

    pack_size: int = 256
    group_by: Literal["slide", "none"] = "none"
    order: Literal["shuffle", "path", "stored"] = "shuffle"
    seed: int = 0
    exclude_slides: Sequence[str] = ()
    splits: SlideTable | None = None
    shard_bytes: int = SHARD_BYTES
    recoding: Recoding | None = None

    def recorded(self) -> dict[str, Any]:
        """For the manifest: numbers of slides, never the name of one that was withdrawn."""
        options = {n: getattr(self, n) for n in ("pack_size", "group_by", "order", "seed")}
        return options | {
            "excluded_slides": len(set(self.exclude_slides)),
            "splits_by": None if self.splits is None else self.splits.by,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Stretch:
    """Patches of one split and one codebook: rows of the old patch table in their new order."""

    split: str
    book: int
    rows: np.ndarray


def repack(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Repacking | None = None,
    overwrite: bool = False,
) -> Manifest:
    """A new data set of the same columns and masks, and, without `recoding`, of the same codes.

    The old one is only read. Holds the columns in memory, some 100 bytes a patch. Patches of
    different codebooks cannot share a shard: each codebook's stay together within a split. Golden
    patches are those of the old set that are still there, which may be none.
    """
    out, source, options = Path(out), local_folder(folder), options or Repacking()
    check_new(out, overwrite, [source])
    shards = ShardSet(source)
    manifest = shards.manifest
    kept = remaining_rows(shards, options.exclude_slides)
    divided = divide(shards, kept, options)  # before a codebook is fitted
    recoder = Recoder(shards, options.recoding, options.seed) if options.recoding else None
    contracts = [
        dataclasses.replace(manifest.contract, codebook=book) for book in manifest.codebooks
    ]
    if recoder:
        contracts = [recoder.contract] * len(contracts)
    check_room(out, len(kept) * contracts[0].bytes_per_patch - stored_bytes(out))
    with new_data_set(out, overwrite, [source]):
        columns = read_columns(shards)
        stretches = [
            Stretch(stretch.split, stretch.book, arrange(shards, columns, stretch.rows, options))
            for stretch in divided
        ]
        composer = Composer(out, contracts[0], manifest.classes)  # a head knows their numbers
        with progress(total=len(kept), desc="patches", unit="patch") as bar:
            for stretch in stretches:
                packs = read_packs(shards, columns, stretch, options, bar)
                if recoder:
                    packs = recoder.recoded(packs, manifest.codebooks[stretch.book])
                composer.add_packs(
                    stretch.split, contracts[stretch.book], packs, options.shard_bytes
                )
        repacked = composer.tables(describe(manifest, options, recoder))
        if (
            recoder is None
            and repacked.contract.codebook.codebook_id != manifest.contract.codebook.codebook_id
        ):
            made = repacked.made | {"codebook": {"origin": "of a part of a merged set"}}
            repacked = dataclasses.replace(repacked, made=made)
        order = np.concatenate([stretch.rows for stretch in stretches])
        golden = recoder.golden(order) if recoder else move_golden(shards, order)
        write_atomically(out / GOLDEN, golden)
        join_slide_records([source], out, without=options.exclude_slides)
        return complete(out, repacked)


def remaining_rows(shards: ShardSet, excluded: Sequence[str]) -> np.ndarray:
    """Rows of the patches that stay; UnknownNameError for a slide that is not there.

    A withdrawn slide that is misspelt would otherwise stay in silence.
    """
    names = shards.manifest.slides
    number = {name: index for index, name in enumerate(names)}
    # Slides without a patch are in what is kept of slides alone.
    known = {*names, *(one.name for one in read_slide_records(Path(shards.folder)))}
    for name in excluded:
        if name not in known:
            raise unknown_name("slide", name, known)
    gone = np.isin(shards.patches["slide"], [number[n] for n in excluded if n in number])
    if gone.all():
        raise InputError(f"{shards.folder}: every patch is of an excluded slide; nothing is left")
    return np.flatnonzero(~gone)


def divide(shards: ShardSet, rows: np.ndarray, options: Repacking) -> list[Stretch]:
    """The rows by split (sorted) and codebook, each in the stored order."""
    if options.splits is None:
        names = sorted(shards.manifest.splits)
        starts = [shards.patch_range(name)[0] for name in names]
        split_of = np.searchsorted(starts, rows, side="right") - 1
    else:
        names, split_of = listed_splits(shards, rows, options.splits)
    books = shards.codebook_numbers(rows)
    stretches = []
    for split in np.unique(split_of).tolist():
        for book in np.unique(books[split_of == split]).tolist():
            chosen = rows[(split_of == split) & (books == book)]
            stretches.append(Stretch(names[split], book, chosen))
    return stretches


def listed_splits(
    shards: ShardSet, rows: np.ndarray, table: SlideTable
) -> tuple[list[str], np.ndarray]:
    """Splits by name, and the number of each row's; InputError for a slide that has none."""
    numbers = shards.patches[rows]["slide"]
    if (numbers < 0).any():
        count = number_of(int((numbers < 0).sum()), "patch has", "patches have")
        raise InputError(f"{shards.folder}: {count} no slide; splits by {table.by} need one")
    present, place_of = np.unique(numbers, return_inverse=True)
    slides = [shards.manifest.slides[number] for number in present.tolist()]
    pictures = [Picture(slide, "", slide=slide) for slide in slides]
    placed, notes = apply_slide_table(pictures, table, is_split_file=True)
    for note in notes:
        logger.info("%s", note)
    bad = next((one for one in placed if not SPLIT_PATTERN.fullmatch(one.split)), None)
    if bad:
        raise InputError(f"{table.path}: split {bad.split!r} of {bad.slide}; use [a-z0-9_] only")
    names = sorted({one.split for one in placed})
    split_of = np.array([names.index(one.split) for one in placed])
    return names, split_of[place_of]


def arrange(
    shards: ShardSet, columns: pa.Table, rows: np.ndarray, options: Repacking
) -> np.ndarray:
    if options.order == "shuffle":
        rows = np.random.default_rng([options.seed, 3]).permutation(rows)
    elif options.order == "path":
        # By folder, then by name, as a conversion lists files: a/x before a-b/x.
        paths = pc.replace_substring(columns["source"], "/", "\x01")
        keys = pa.table({"path": paths, "y": columns["y"], "x": columns["x"]}).take(rows)
        order = pc.sort_indices(keys, [(name, "ascending") for name in ("path", "y", "x")])
        rows = rows[order.to_numpy()]
    if options.group_by == "slide":
        slides = shards.patches[rows]["slide"]
        if (slides < 0).any():
            count = number_of(int((slides < 0).sum()), "patch has", "patches have")
            raise InputError(f"{shards.folder}: {count} no slide; --group-by none")
        rows = rows[np.argsort(slides, kind="stable")]
    return rows


def read_packs(
    shards: ShardSet, columns: pa.Table, stretch: Stretch, options: Repacking, bar: tqdm[Any]
) -> Iterator[Part]:
    rows = stretch.rows
    if options.group_by == "slide":
        ends = np.flatnonzero(np.diff(shards.patches[rows]["slide"])) + 1
    else:
        ends = np.arange(options.pack_size, len(rows), options.pack_size)
    for part in np.split(rows, ends):
        table = columns.take(part).cast(SCHEMA)
        if shards.columns.has_masks:
            table = table.append_column(MASK_SCHEMA.field(0), [shards.columns.mask_pngs(part)])
        yield shards.read_codes(part), table
        bar.update(len(part))


def read_columns(shards: ShardSet) -> pa.Table:
    """All columns of all patches, in the order of the patch table."""
    tables = []
    for pack in range(len(shards.packs)):
        where = f"{shards.pack_table.shard_path(pack)}, {shards.pack_table.key(pack)}.{PATCHES}"
        content = shards.read_sound(pack, PATCHES)
        table = decode_table(bytes(content), where, SCHEMA, int(shards.first_patch.counts(pack)))
        tables.append(table.cast(LARGE))
    return pa.concat_tables(tables).combine_chunks()


def move_golden(shards: ShardSet, order: np.ndarray) -> bytes:
    """The new set's golden file: the old one's patches that are still there, at their new rows.

    order  old rows in the order in which they now stand
    """
    table = read_golden_table(Path(shards.folder), shards.manifest.golden_sha256)
    places = [np.flatnonzero(order == row) for row in table["row"].to_pylist()]
    rows = np.array([int(place[0]) if len(place) else -1 for place in places], np.int64)
    return encode_table(renumbered(table, rows))


def describe(manifest: Manifest, options: Repacking, recoder: Recoder | None) -> dict[str, Any]:
    """The old set's `made` with what was done to it; sources of excluded slides are not in it."""
    excluded = options.exclude_slides
    left_out = [
        entry
        for entry in manifest.made.get("left_out", [])
        if not any(slide in str(entry.get("source")) for slide in excluded)
    ]
    done = {"from": manifest.dataset_id} | options.recorded()
    changed: dict[str, Any] = {"left_out": left_out}
    if recoder:
        done["recoded"] = recoder.recorded()
        changed["codebook"] = recoder.stored.made
    history = [*manifest.made.get("repacked", []), done]
    return dict(manifest.made) | changed | {"repacked": history}
