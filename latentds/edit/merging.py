"""Merge data sets of one latent_id: shards copied, packs renumbered, codebooks side by side."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from latentds.conversion.workdir import stored_bytes
from latentds.core.display import progress
from latentds.core.storage import READ_BYTES, check_room, naming, sha256_file, write_atomically
from latentds.edit.outputs import check_new, local_folder, new_data_set
from latentds.errors import FormatError, InputError
from latentds.loading.fields_of_view import warn_of_fields
from latentds.loading.options import check_mixable, warn_of_alike
from latentds.store.composing import Composer, complete
from latentds.store.format import GOLDEN, Contract, alike_names, joined_names, pack_key
from latentds.store.golden import MAX_GOLDEN, read_golden_table, renumbered
from latentds.store.manifest import Manifest
from latentds.store.packs import BLOCK, ShardWriter, encode_table, member_header, scan_members
from latentds.store.reader import ShardSet
from latentds.store.slide_records import join_slide_records

BLOCK_PATCHES = 4096  # whose codes are compared at a time


def merge(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    overwrite: bool = False,
    made: dict[str, Any] | None = None,
) -> Manifest:
    """One data set of the patches of several; nothing is decoded or quantized anew.

    folders  local data sets of one latent_id, codes shape and patch size, no patch's name in two
    made     how the new set came about; what each of them says of itself by default
    raises   ContractError for sets that do not belong together, InputError for a name that two
             have, FormatError for a shard that is not what its set recorded
    """
    out, paths = Path(out), [local_folder(folder) for folder in folders]
    if len(paths) < 2:
        raise InputError(f"{len(paths)} data sets to merge; name two or more")
    sets = [ShardSet(path) for path in paths]
    check_mixable(sets)
    warn_of_fields(sets)
    check_new(out, overwrite, paths)
    wanted = sum(shard.bytes for shards in sets for shard in shards.manifest.shards)
    check_room(out, wanted - stored_bytes(out))
    check_distinct(sets)
    with new_data_set(out, overwrite, paths):
        classes = joined_names([shards.manifest.classes for shards in sets])
        if alike := alike_names(classes):
            warn_of_alike(sets, alike)
        composer = Composer(out, sets[0].manifest.contract, classes)
        copied = copy_shards(composer, sets)
        manifest = composer.tables(made or describe([shards.manifest for shards in sets]))
        write_atomically(out / GOLDEN, join_golden(sets, copied, manifest))
        join_slide_records(paths, out)
        return complete(out, manifest)


def check_distinct(sets: Sequence[ShardSet]) -> None:
    seen = np.zeros(0, np.uint64)
    for number, shards in enumerate(sets):
        hashes = key_hashes(shards)
        common = np.intersect1d(seen, hashes)
        if len(common):
            name_duplicate(sets[:number], shards, hashes, common)
        seen = np.union1d(seen, hashes)


def key_hashes(shards: ShardSet) -> np.ndarray:
    """64-bit hashes of all patches' keys, uint64 (N,): 8 bytes a patch instead of a name."""
    hashes = np.zeros(len(shards), np.uint64)
    for pack in progress(range(len(shards.packs)), desc="keys", unit="pack"):
        first = int(shards.first_patch[pack])
        keys = shards.columns.of_pack(pack)["key"]
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        hashes[first : first + len(keys)] = np.frombuffer(digests, "<u8")
    return hashes


def name_duplicate(
    earlier: Sequence[ShardSet], shards: ShardSet, hashes: np.ndarray, common: np.ndarray
) -> None:
    """Raise InputError for keys that are there twice; two keys of one hash are let pass.

    Of equal codes they are one patch. Of others they may be two: files of two folders often have
    the same names.
    """
    own = rows_by_key(shards, hashes, common)
    for other in earlier:
        theirs = rows_by_key(other, key_hashes(other), common)
        both = sorted(own.keys() & theirs.keys())
        if not both:
            continue
        rows = (np.array([found[key] for key in both]) for found in (own, theirs))
        unlike = next((both[place] for place in unlike_codes((shards, other), *rows)), None)
        if unlike is None:
            raise InputError(
                f"{shards.folder}: {len(both):,} patches are in {other.folder} too, by name and "
                f"codes, among them {both[0]!r}; leave them out of one ('latentds repack "
                "--exclude-slides', or convert it without them)"
            )
        raise InputError(
            f"{shards.folder}: {len(both):,} patches have names that {other.folder} has too, among "
            f"them {unlike!r}, whose codes differ. Other pictures: give one set's files or slides "
            "other names and convert it anew, or train on both as they are, Mixture({folder: "
            "weight, ...}). The same pictures, coded otherwise: leave them out of one"
        )


def rows_by_key(shards: ShardSet, hashes: np.ndarray, common: np.ndarray) -> dict[str, int]:
    """Rows of the patches whose keys' hashes are among the common ones."""
    rows = np.flatnonzero(np.isin(hashes, common))
    return dict(zip(shards.read_columns(rows, ["key"])["key"], rows.tolist(), strict=True))


def unlike_codes(pair: tuple[ShardSet, ShardSet], *rows: np.ndarray) -> Iterator[int]:
    """Places at which the patches of two sets have other codes."""
    for start in range(0, len(rows[0]), BLOCK_PATCHES):
        one, other = (
            shards.read_codes(own[start : start + BLOCK_PATCHES])
            for shards, own in zip(pair, rows, strict=True)
        )
        differ = (one != other).reshape(len(one), -1).any(axis=1)
        yield from (start + np.flatnonzero(differ)).tolist()


def copy_shards(composer: Composer, sets: Sequence[ShardSet]) -> list[list[str]]:
    """The new names of every set's shards, which are copied: split by split, set by set."""
    total = sum(shard.bytes for shards in sets for shard in shards.manifest.shards)
    splits = sorted({shard.split for shards in sets for shard in shards.manifest.shards})
    copied: list[list[str]] = [[""] * len(shards.manifest.shards) for shards in sets]
    with progress(total=total, desc="shards", unit="B", unit_scale=True) as bar:
        for split in splits:
            for shards, names in zip(sets, copied, strict=True):
                for number, record in enumerate(shards.manifest.shards):
                    if record.split == split:
                        names[number] = add_copy(composer, shards, number)
                        bar.update(record.bytes)
    return copied


def add_copy(composer: Composer, shards: ShardSet, number: int) -> str:
    """The new name of a set's shard; one that is not as its set recorded it is refused."""
    record = shards.manifest.shards[number]
    source = Path(shards.folder) / record.name
    found = sha256_file(source)
    if found != record.sha256:
        raise FormatError(
            f"{source}: sha256 is {found[:12]}..., its manifest records {record.sha256[:12]}...; "
            "damaged or replaced, fetch it anew ('latentds verify' lists all damage)"
        )
    # Only the codebook may differ from shard to shard; each set's decoder and card stay in the
    # manifest's `made`.
    codebook = shards.manifest.contract_of(number).codebook
    contract = dataclasses.replace(composer.contract, codebook=codebook)
    copy = functools.partial(copy_shard, source, contract, record.split)
    index = composer.add_shard(record.split, contract, copy)
    first = int(shards.first_pack[number])
    recorded = shards.packs[first : first + record.packs]
    for field in ("codes_crc32", "patches_crc32", "masks_crc32"):
        if not np.array_equal(index.packs[field], recorded[field]):
            raise FormatError(
                f"{source}: other bytes than its set recorded were copied; run the same command "
                "again"
            )
    return index.record.name


def copy_shard(source: Path, contract: Contract, split: str, path: Path, number: int) -> None:
    """Copy a shard to be number `number` of its split: only member names and contract change."""
    with source.open("rb") as file, naming(path), ShardWriter(path, contract) as writer:
        places: dict[str, int] = {}
        for member in scan_members(file, str(source)):
            place = places.setdefault(member.key, len(places))
            name = f"{pack_key(split, number, place)}.{member.kind}"
            writer.file.write(member_header(name, member.size))
            copy_bytes(file, writer.file, member.offset, member.size + -member.size % BLOCK)
        writer.finish()


def copy_bytes(source: BinaryIO, target: BinaryIO, offset: int, size: int) -> None:
    source.seek(offset)
    while size and (block := source.read(min(size, READ_BYTES))):
        target.write(block)
        size -= len(block)


def join_golden(
    sets: Sequence[ShardSet], copied: Sequence[Sequence[str]], manifest: Manifest
) -> bytes:
    """The golden file of the merged set: patches of every set in turn, at most 32.

    Sets with another decoder than the first have none to give: their pixels are not what it makes.
    """
    first, tables = 0, []
    first_row: dict[str, int] = {}
    for shard in manifest.shards:
        first_row[shard.name] = first
        first += shard.patches
    for shards, names in zip(sets, copied, strict=True):
        if shards.manifest.contract.decoder_id != manifest.contract.decoder_id:
            continue
        table = read_golden_table(Path(shards.folder), shards.manifest.golden_sha256)
        rows = np.array(table["row"].to_pylist(), np.int64)
        number = shards.shards_of(shards.packs_of(rows))
        own = np.cumsum([0, *(shard.patches for shard in shards.manifest.shards)])
        new = np.array([first_row[name] for name in names], np.int64)
        tables.append(renumbered(table, rows - own[number] + new[number]))
    turns = np.concatenate([np.arange(len(table)) for table in tables])
    chosen = np.sort(np.argsort(turns, kind="stable")[:MAX_GOLDEN])
    joined = pa.concat_tables(tables).take(chosen)
    return encode_table(joined.sort_by("row"))


def describe(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """How the merged set was made: what every set says of itself, and what readers look up."""
    from latentds.version import __version__

    merged = [
        {
            "dataset_id": manifest.dataset_id,
            "patches": manifest.patches,
            "decoder_id": manifest.contract.decoder_id,
            "codebook_id": manifest.contract.codebook.codebook_id,
            "made": {name: value for name, value in manifest.made.items() if name != "left_out"},
        }
        for manifest in manifests
    ]
    left_out = [entry for manifest in manifests for entry in manifest.made.get("left_out", [])]
    return {
        "merged": merged,
        "versions": {"latentds": __version__},
        "codebook": manifests[0].made.get("codebook", {}),
        "masks": any(bool(manifest.made.get("masks")) for manifest in manifests),
        "left_out": left_out,
    }
