"""Check a data set against its manifest: counts, hashes, every member, golden patches decoded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from latentds.autoencoders import load_autoencoder, load_for_decoding
from latentds.autoencoders.autoencoder import Autoencoder
from latentds.core.display import left_out_text
from latentds.core.storage import canonical_json, sha256_file
from latentds.errors import FormatError, LatentdsError, no_folder, unopened
from latentds.store.channel_statistics import measure_statistics
from latentds.store.format import DIGESTS, MANIFEST, MASKS, PACKS_TABLE, PATCHES_TABLE, ROWS_CRC32
from latentds.store.golden import THUMBNAIL_SLACK_DB, decode_pixels, likeness_db, read_golden
from latentds.store.index import ShardIndex, index_shard, pack_rows, renumber
from latentds.store.manifest import read_manifest
from latentds.store.pack_columns import decode_mask
from latentds.store.packs import (
    MASK_SCHEMA,
    ScannedPack,
    decode_table,
    read_contract,
    read_member,
    scan_shard,
)
from latentds.store.reader import ShardSet

NOT_DECODED = "golden patches not decoded"
CHECKSUMS = ("codes_crc32", "patches_crc32", "masks_crc32")
LEVELS = ("manifest", "sha256", "members", "golden")


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was checked and what is wrong.

    levels    the levels that were reached
    problems  (level, one line each); empty means that all is well
    notes     what could not be checked, or is only worth knowing
    """

    levels: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        return not self.problems


def verify(
    folder: str | os.PathLike[str],
    level: str = "golden",
    autoencoder: Autoencoder | str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Check a data set up to a level; damage is collected, not raised.

    level        manifest (its own counts, sizes of the files), sha256 (every shard and table),
                 members (every header, checksum and column against the tables), golden (stored
                 patches decode to the recorded pixels)
    autoencoder  whose decoder checks the golden patches; the recorded one by default
    raises       ValueError for an unknown level; FileNotFoundError where there is no folder
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; one of {', '.join(LEVELS)}")
    if not Path(folder).is_dir():
        raise no_folder(folder)
    path, notes = Path(folder), list[str]()
    checks: dict[str, Callable[[], Iterable[str]]] = {
        "manifest": lambda: check_manifest(path, notes),
        "sha256": lambda: check_hashes(path),
        "members": lambda: check_members(path),
        "golden": lambda: check_golden(path, autoencoder, notes),
    }
    problems: list[tuple[str, str]] = []
    reached: list[str] = []
    for name in LEVELS[: LEVELS.index(level) + 1]:
        progress(name)
        reached.append(name)
        try:
            for line in checks[name]():
                problems.append((name, line))
        except LatentdsError as error:
            problems.append((name, str(error)))
        except OSError as error:
            problems.append((name, str(unopened(error.filename or path, error))))
        if name == "manifest" and problems:
            break  # nothing below can be judged against a manifest that is wrong
    return Verification(tuple(reached), tuple(problems), tuple(notes))


def check_manifest(folder: Path, notes: list[str]) -> tuple[()]:
    """The manifest's own sense, the presence and size of every file, the tables' headers."""
    manifest = read_manifest(folder)
    ShardSet(folder)  # refuses sizes and tables that are not what the manifest says
    listed = {shard.name for shard in manifest.shards}
    for path in sorted((folder / "data").iterdir()):
        if f"data/{path.name}" not in listed:
            notes.append(
                f"{path}: not in the manifest; readers that take data/*.tar would read it too"
            )
    for left_out in manifest.made.get("left_out", []):
        notes.append(f"left out at conversion: {left_out.get('source')}: {left_out_text(left_out)}")
    return ()


def check_hashes(folder: Path) -> Iterator[str]:
    """sha256 of every shard and table."""
    manifest = read_manifest(folder)
    expected = {shard.name: shard.sha256 for shard in manifest.shards}
    expected |= {name: str(entry.get("sha256")) for name, entry in manifest.tables.items()}
    for name, digest in expected.items():
        if ".." in Path(name).parts or Path(name).is_absolute():
            yield f"{folder}: the manifest names {name!r}, outside of the folder"
            continue
        if not (folder / name).is_file():
            yield f"{folder / name}: missing; the manifest lists it, fetch it"
        elif (found := sha256_file(folder / name)) != digest:
            yield (
                f"{folder / name}: sha256 {found[:12]}..., the manifest says {digest[:12]}...; "
                "damaged or replaced, fetch it anew"
            )


def check_members(folder: Path) -> Iterator[str]:
    """Every shard, scanned from its first byte, says what manifest and tables say."""
    shards = ShardSet(folder, check_codes=False)
    manifest = shards.manifest
    for number, record in enumerate(manifest.shards):
        path = folder / record.name
        try:
            header, contract = read_contract(path), manifest.contract_of(number)
            if canonical_json(header.to_json()) != canonical_json(contract.to_json()):
                yield f"{path}: its header's contract is not the manifest's"
            found = list(scan_shard(path, contract))
            damaged = damaged_packs(shards, number, found, path)
            yield from damaged
            if damaged:
                continue  # columns that are not what was written are not parsed
            # The hash is the level before this one: no need to read the file for it again.
            index = index_shard(folder, record.name, contract, found, record.sha256)
            yield from compare(shards, number, index, path)
            check_masks(path, found, contract.patch_px)
        except FormatError as error:
            yield str(error)
    yield from check_statistics(folder)


def check_statistics(folder: Path) -> Iterator[str]:
    """The channel statistics in the manifest are those of the stored codes."""
    shards = ShardSet(folder)
    recorded = shards.manifest.statistics
    if recorded is not None and measure_statistics(shards) != recorded:
        yield (
            f"{folder / MANIFEST}: channel_statistics are not those of the stored codes; latents "
            "normalized by them would be off, fetch it anew"
        )


def damaged_packs(
    shards: ShardSet, number: int, found: Sequence[ScannedPack], path: Path
) -> list[str]:
    """A line for every pack of a shard whose members do not have the recorded checksums."""
    listed = shards.packs[slice(*shards.first_pack[number : number + 2])]
    if len(found) != len(listed):
        return [f"{path}: {len(found)} packs, {PACKS_TABLE} lists {len(listed)}"]
    rows = pack_rows(found)
    return [
        f"{path}, {found[place].key}: {name.removesuffix('_crc32')} do not have the recorded "
        "checksum; damaged"
        for name in CHECKSUMS
        for place in np.flatnonzero(rows[name] != listed[name]).tolist()
    ]


def compare(shards: ShardSet, number: int, index: ShardIndex, path: Path) -> Iterator[str]:
    """What a scanned shard says against the tables and the manifest."""
    manifest = shards.manifest
    if set(index.classes) - set(manifest.classes) or set(index.slides) - set(manifest.slides):
        yield f"{path}: has labels or slides the manifest does not list"
        return
    own = slice(*shards.first_pack[number : number + 2])
    stored_packs, first = shards.packs[own], int(shards.pack_table.first_patches[number])
    packs, patches = renumber(index, number, first, manifest.classes, manifest.slides)
    if not stored_packs[ROWS_CRC32].any():  # of before it was recorded
        packs[ROWS_CRC32] = 0
    if not np.array_equal(packs, stored_packs):
        yield (f"{path}: packs are not as {PACKS_TABLE} says (offsets, counts or checksums)")
    if shards.digests is not None and not np.array_equal(shards.digests[own], index.digests):
        yield f"{path}: packs do not have the sha256 that {DIGESTS} lists"
    stored = shards.patches[first : first + len(patches)]
    if stored.tobytes() != patches.tobytes():
        yield f"{path}: columns are not as {PATCHES_TABLE} says"
    listed = manifest.shards[number]
    listed = listed._replace(labels={k: v for k, v in listed.labels.items() if v})
    for field, found, said in zip(listed._fields, index.record, listed, strict=True):
        if found != said:
            yield f"{path}: {field} is {found}, the manifest says {said}"


def check_masks(path: Path, packs: Sequence[ScannedPack], patch_px: tuple[int, int]) -> None:
    """Raise FormatError unless every masks member has the pack's length and the patches' size."""
    for pack in packs:
        if "masks_bytes" not in pack.row:
            continue
        where = f"{path}, {pack.key}.{MASKS}"
        content = read_member(path, pack, "masks")
        table = decode_table(content, where, MASK_SCHEMA, pack.row["count"])
        for encoded in table["mask_png"].to_pylist():
            if encoded is not None:
                decode_mask(encoded, patch_px, where)


def check_golden(
    folder: Path, given: Autoencoder | str | os.PathLike[str] | None, notes: list[str]
) -> Iterator[str]:
    """Golden patches: codes as in the shards, pixels as recorded, looks as the thumbnails."""
    shards = ShardSet(folder)
    contract = shards.manifest.contract
    golden = read_golden(folder, contract, len(shards))
    if not len(golden.rows):
        notes.append(f"{folder}: no golden patches, nothing to check a decoder with")
        return
    stored = shards.read_codes(golden.rows)
    different = (stored != golden.codes).any(axis=tuple(range(1, stored.ndim)))
    for row in golden.rows[different]:
        yield f"{folder}: codes of golden patch {row} are not those in its shard"
    autoencoder = find_decoder(contract.autoencoder.get("name"), given)
    if autoencoder is None:
        notes.append(f"{NOT_DECODED}: made with a local autoencoder, pass --autoencoder PATH")
        return
    contract.check_decoder(autoencoder.card, folder)
    books, numbers = shards.manifest.codebooks, shards.codebook_numbers(golden.rows)
    try:
        decoded = decode_pixels(golden.codes, books, autoencoder, contract.patch_px, numbers)
    except IndexError as error:  # codes of another codebook
        yield f"{folder}: golden patches: {error}"
        return
    for place, row in enumerate(golden.rows):
        found = likeness_db(decoded[place], golden.thumbnails[place])
        if found < golden.thumbnail_psnr_db[place] - THUMBNAIL_SLACK_DB:
            yield (
                f"{folder}: golden patch {row} decodes to something else: {found:.1f} dB to its "
                f"thumbnail, {golden.thumbnail_psnr_db[place]:.1f} dB when it was made"
            )
    if autoencoder.card.decoder_id != contract.decoder_id:
        notes.append(
            "decoded with another decoder than the recorded one: pixels compared to thumbnails only"
        )
        return
    worst = np.abs(decoded.astype(np.int16) - golden.decoded).reshape(len(decoded), -1).max(1)
    for row, levels in zip(golden.rows, worst, strict=True):
        if levels > golden.tolerance_levels:
            yield (
                f"{folder}: golden patch {row} decodes up to {levels} of 255 levels off, "
                f"{golden.tolerance_levels} are allowed"
            )


def find_decoder(
    recorded: object, given: Autoencoder | str | os.PathLike[str] | None
) -> Autoencoder | None:
    """The decoder to check with; None where only a local one would do and none was given."""
    from latentds.autoencoders.cards import CARDS

    if given is None:
        return load_autoencoder(str(recorded)) if recorded in CARDS else None
    if isinstance(given, (str, os.PathLike)):
        return load_for_decoding(given)
    return given
