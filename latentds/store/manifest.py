"""The manifest: what a data set holds, shard by shard, and the contract of its codes.

Read as untrusted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import operator
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from latentds.core.storage import Kind, check_kinds, digest_json, parse_json, read_bytes
from latentds.errors import FormatError, no_folder, unknown_name
from latentds.quantizers.codebooks import ENCODINGS, ChannelStatistics
from latentds.quantizers.scalar import AnyCodebook
from latentds.store.format import (
    DIGESTS,
    FORMAT,
    GOLDEN,
    MANIFEST,
    MAX_BLOCK_ROWS,
    PACKS_TABLE,
    PATCHES_TABLE,
    SHARD_PATTERN,
    Contract,
    check_format,
)
from latentds.store.open_files import block_sums

MAX_MANIFEST_BYTES = 1 << 28
MANY_SHARDS = 1000  # from which the text is for machines: a tenth of it would be spaces
SHA256 = re.compile(r"[0-9a-f]{64}")
# Of what tells how a set was made, the parts that commands show or go by.
MADE_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("options", "source", "converted_to_rgb", "source_encodings"), dict),
    **dict.fromkeys(("encode_batch", "threads", "ignored_files"), int),
    **dict.fromkeys(("merged", "repacked"), list),
    "device": str,
}
LEFT_OUT_KINDS: dict[str, Kind] = {"detail": str, "patches": int, "of": int}
CODEBOOK_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("snr_db", "saturated_share"), (int, float)),
    **dict.fromkeys(("values", "seed", "dead_levels"), int),
    **dict.fromkeys(("origin", "file"), str),
}


class ShardRecord(NamedTuple):  # of 8,000, frozen dataclasses would take longer to make
    """One shard: path in the folder, split, size, hash, codebook, counts, and patches a class."""

    name: str
    split: str
    bytes: int
    sha256: str
    codebook_id: str
    packs: int
    patches: int
    labels: dict[str, int]


SHARD_FIELDS = operator.itemgetter(*ShardRecord._fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `.latentds/manifest.json` says.

    contract  what the codes mean
    more_codebooks  those of merged sets, beside the contract's own
    shards    in the order of the tables: splits sorted, shards of a split in sequence
    classes   label names; a stored label is an index into them
    slides    slide names; a stored slide is an index into them
    tables    sha256 and bytes of the files beside the shards
    made      how the run was made: options, versions, device, counts (no path, host, user or time)
    pack_patches  patches of every pack but the last of its shard; None where they are not alike
    statistics  mean and spread of every latent channel; None in sets of before they were recorded
    has_digest  whether its text was checked as a whole; not in sets of before there was a digest
    """

    contract: Contract
    shards: tuple[ShardRecord, ...]
    classes: tuple[str, ...]
    slides: tuple[str, ...]
    tables: dict[str, dict[str, Any]]
    made: dict[str, Any]
    more_codebooks: tuple[AnyCodebook, ...] = ()
    pack_patches: int | None = None
    statistics: ChannelStatistics | None = None
    has_digest: bool = False

    @property
    def codebooks(self) -> tuple[AnyCodebook, ...]:
        """Every codebook of the set, the contract's first."""
        return (self.contract.codebook, *self.more_codebooks)

    @functools.cached_property
    def codebook_numbers(self) -> tuple[int, ...]:
        """Which of `codebooks` every shard has."""
        number = {book.codebook_id: place for place, book in enumerate(self.codebooks)}
        return tuple(number[shard.codebook_id] for shard in self.shards)

    def contract_of(self, shard: int) -> Contract:
        """The contract in a shard's header: the set's, with the shard's codebook."""
        book = self.codebooks[self.codebook_numbers[shard]]
        return dataclasses.replace(self.contract, codebook=book)

    @functools.cached_property
    def patches(self) -> int:
        return sum(shard.patches for shard in self.shards)

    @functools.cached_property
    def packs(self) -> int:
        return sum(shard.packs for shard in self.shards)

    @functools.cached_property
    def splits(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.patches
        return counts

    def labels(self, split: str | None = None) -> dict[str, int]:
        """Patches of every class, of one split or all."""
        counts = dict.fromkeys(self.classes, 0)
        for shard in self.shards:
            if split in (None, shard.split):
                for name, count in shard.labels.items():
                    counts[name] += count
        return counts

    def patch_range(self, split: str) -> tuple[int, int]:
        """First row of a split in the patch table, and one past its last."""
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        first = sum(shard.patches for shard in self.shards if shard.split < split)
        return first, first + self.splits[split]

    def pack_range(self, split: str) -> tuple[int, int]:
        """First pack of a split in the pack table, and one past its last."""
        if split not in self.splits:
            raise unknown_name("split", split, self.splits)
        first = sum(shard.packs for shard in self.shards if shard.split < split)
        return first, first + sum(shard.packs for shard in self.shards if shard.split == split)

    @functools.cached_property
    def dataset_id(self) -> str:
        """Identity of the stored patches: hash of the shards' names and hashes."""
        return digest_json([[shard.name, shard.sha256] for shard in self.shards])

    @property
    def golden_sha256(self) -> str | None:
        """Hash of the golden file; None while the manifest is not complete."""
        return self.tables.get(GOLDEN, {}).get("sha256")

    def to_json(self) -> str:
        record = {
            "format": FORMAT,
            "contract": self.contract.to_json(),
            "patches": self.patches,
            "packs": self.packs,
            "splits": self.splits,
            "classes": list(self.classes),
            "slides": list(self.slides),
            "shards": [shard._asdict() for shard in self.shards],
            "tables": self.tables,
            "made": self.made,
        }
        if self.more_codebooks:
            record["codebooks"] = [book.to_json() for book in self.codebooks]
        if self.pack_patches is not None:
            record["pack_patches"] = self.pack_patches
        if self.statistics is not None:
            record["channel_statistics"] = dataclasses.asdict(self.statistics)
        record["digest"] = digest_json(record)
        plain: Any = {"separators": (",", ":")}  # the text that its digest is of
        layout = {"indent": 1} if len(self.shards) < MANY_SHARDS else plain
        return json.dumps(record, sort_keys=True, allow_nan=False, **layout) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a data set's folder."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise no_folder(folder)
    if not path.is_file():
        begun = path.parent.exists()
        hint = "its conversion has not ended; run it again" if begun else "convert first"
        raise FormatError(f"{folder}: no {MANIFEST}; not a complete latentds data set ({hint})")
    return parse_manifest(read_bytes(path, MAX_MANIFEST_BYTES), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A manifest from its file's untrusted bytes; FormatError names what is wrong."""
    record = parse_json(content, where)
    if not isinstance(record, dict):
        raise FormatError(f"{where}: not a JSON object; not a latentds data set")
    check_format(record.get("format"), where)
    contract = Contract.from_json(record.get("contract"), where, version_of(record))
    try:
        manifest = Manifest(
            contract=contract,
            shards=tuple(parse_shard(shard, where) for shard in record["shards"]),
            classes=names(record["classes"]),
            slides=names(record["slides"]),
            tables=parse_tables(record["tables"]),
            made=parse_made(record["made"]),
            more_codebooks=parse_codebooks(record.get("codebooks"), contract),
            pack_patches=record.get("pack_patches"),
            statistics=parse_statistics(
                record.get("channel_statistics"), contract.latents_shape[0]
            ),
            has_digest="digest" in record,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{where}: manifest is damaged ({error!r}); fetch it anew") from error
    check_counts(manifest, record, where)
    if manifest.has_digest:
        check_digest(record, content, where)
    return manifest


def check_digest(record: dict[str, Any], content: bytes, where: str) -> None:
    """Refuse a manifest that is not of the digest it records.

    Last, so that what can be told more precisely is. Values that were exchanged, as class names,
    contradict nothing else.
    """
    # Text that is canonical but for its digest is hashed as it is: to write it anew takes longer.
    field, text = f'"digest":"{record["digest"]}",'.encode(), memoryview(content)
    if (start := content.find(field)) >= 0:
        hashed = hashlib.sha256(text[:start])
        hashed.update(text[start + len(field) : len(content) - content.endswith(b"\n")])
        if record["digest"] == f"sha256:{hashed.hexdigest()}":
            return
    try:
        digest = digest_json({name: record[name] for name in record if name != "digest"})
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: manifest is damaged ({error}); fetch it anew") from error
    if record["digest"] != digest:
        raise FormatError(
            f"{where}: not of the digest it records; damaged or edited by hand, fetch it anew"
        )


def version_of(record: dict[str, Any]) -> object:
    """The version of latentds that a manifest says it was made by; None where it says none."""
    versions = made.get("versions") if isinstance(made := record.get("made"), dict) else None
    return versions.get("latentds") if isinstance(versions, dict) else None


def parse_codebooks(records: Any, contract: Contract) -> tuple[AnyCodebook, ...]:
    """The codebooks beside the contract's own (ValueError where they do not belong to it)."""
    if records is None:
        return ()
    books = [ENCODINGS[contract.encoding].from_json(record) for record in records]
    distinct = {book.codebook_id for book in books}
    own = contract.codebook.codebook_id
    if not books or len(distinct) != len(books) or books[0].codebook_id != own:
        raise ValueError("codebooks must be distinct, the contract's first")
    if any(book.latents_shape_of(contract.codes_shape) != contract.latents_shape for book in books):
        raise ValueError("the codebooks are not of the same latents")
    return tuple(books[1:])


def parse_shard(record: Any, where: str) -> ShardRecord:
    """One shard's record; its name may not lead out of the folder."""
    name, split, size, sha256, codebook_id, packs, patches, labels = SHARD_FIELDS(record)
    if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
        raise FormatError(f"{where}: shard name {name!r} is not data/SPLIT-000000.tar; refused")
    if split != name[5:-11]:  # of data/SPLIT-000000.tar
        raise FormatError(f"{where}: {name} is listed under split {split!r}")
    if not (
        type(size) is type(packs) is type(patches) is int and packs > 0 and min(size, patches) > 0
    ):
        counts = {"bytes": size, "packs": packs, "patches": patches}
        raise FormatError(f"{where}: {name} has counts {counts}; all must be positive integers")
    if not SHA256.fullmatch(sha256):
        raise FormatError(f"{where}: {name} has sha256 {sha256!r}")
    labels = dict(labels)
    if labels and (set(map(type, labels.values())) != {int} or min(labels.values()) < 0):
        raise FormatError(f"{where}: {name} has label counts {labels}")
    codebook_id = sys.intern(str(codebook_id))
    return ShardRecord(name, sys.intern(split), size, sha256, codebook_id, packs, patches, labels)


def parse_made(record: Any) -> dict[str, Any]:
    """How the run was made, the parts that are shown of the types they should have."""
    made = dict(record)
    made["codebook"] = dict(made.get("codebook", {}))
    made["versions"] = dict(made.get("versions", {}))
    made["left_out"] = [dict(entry) for entry in made.get("left_out", [])]
    check_kinds(made, MADE_KINDS, "made.")
    check_kinds(made["codebook"], CODEBOOK_KINDS, "made.codebook.")
    check_kinds(made.get("options") or {}, {"refine": int, "encode_dtype": str}, "made.options.")
    for entry in made["left_out"]:
        if not all(isinstance(entry.get(name), str) for name in ("source", "reason")):
            raise ValueError(f"left_out has {str(entry)[:80]}, not source and reason")
        check_kinds(entry, LEFT_OUT_KINDS, "made.left_out.")
    return made


def parse_statistics(record: Any, channels: int) -> ChannelStatistics | None:
    """The statistics in a manifest, None where it has none; ValueError for what cannot be."""
    if record is None:
        return None
    mean, std = (tuple(float(value) for value in record[name]) for name in ("mean", "std"))
    count = record["count"]
    if len(mean) != channels or len(std) != channels or type(count) is not int or count < 0:
        raise ValueError(f"channel_statistics are not of {channels} channels")
    if not all(map(math.isfinite, mean + std)) or min(std) < 0:
        raise ValueError("channel_statistics must be finite, deviations not negative")
    return ChannelStatistics(mean, std, count)


def parse_tables(record: Any) -> dict[str, dict[str, Any]]:
    """sha256 and bytes of the files beside the shards, by name (ValueError otherwise)."""
    tables = {str(name): dict(entry) for name, entry in record.items()}
    for name, entry in tables.items():
        check_kinds(entry, {"sha256": str, "bytes": int}, f"{name[:40]}: ")
    return tables


def names(values: Any) -> tuple[str, ...]:
    """A list of distinct strings as a tuple (ValueError otherwise)."""
    are_texts = type(values) is list and set(map(type, values)) <= {str}
    if not are_texts or len(set(values)) != len(values):
        raise ValueError("classes and slides must be distinct strings")
    return tuple(values)


def check_counts(manifest: Manifest, record: dict[str, Any], where: str) -> None:
    """Refuse a manifest whose own numbers disagree."""
    if not manifest.shards:
        raise FormatError(f"{where}: no shards; nothing to read")
    order = [shard.name for shard in manifest.shards]
    if order != sorted(set(order)):
        raise FormatError(f"{where}: shards are not sorted, or one is listed twice")
    for field in ("patches", "packs", "splits"):
        if record.get(field) != getattr(manifest, field):
            raise FormatError(
                f"{where}: {field} is {record.get(field)}, its shards add up to "
                f"{getattr(manifest, field)}"
            )
    for name in (PACKS_TABLE, PATCHES_TABLE, GOLDEN):
        if not SHA256.fullmatch(str(manifest.tables.get(name, {}).get("sha256"))):
            raise FormatError(f"{where}: tables do not list {name} with its sha256")
    check_tables(manifest, where)
    check_shards(manifest, where)


def check_tables(manifest: Manifest, where: str) -> None:
    """Refuse checksums that cannot be a table's, and packs of a size that shards contradict."""
    size, shards = manifest.pack_patches, manifest.shards
    if size is not None and (
        type(size) is not int
        or not 0 < size <= max(shard.patches for shard in shards)
        or any(shard.packs != -(-shard.patches // size) for shard in shards)
    ):
        raise FormatError(
            f"{where}: pack_patches is {size!r}, its shards have other packs; fetch it anew"
        )
    for name, rows in (
        *((name, manifest.packs) for name in (PACKS_TABLE, DIGESTS)),
        (PATCHES_TABLE, manifest.patches),
    ):
        entry = manifest.tables.get(name, {})
        try:
            block_sums(entry, rows)
            if entry.get("blocks", "packs") != "packs" or (
                "blocks" in entry and not 0 < (size or 0) <= MAX_BLOCK_ROWS
            ):
                raise ValueError(f"blocks are {entry['blocks']!r} of {size} patches")
        except ValueError as error:
            raise FormatError(f"{where}: {name}: {error}; fetch it anew") from error


def check_shards(manifest: Manifest, where: str) -> None:
    """Refuse shards whose records contradict themselves, the contract or the known codebooks."""
    known = {book.codebook_id for book in manifest.codebooks}
    classes, size = set(manifest.classes), manifest.contract.bytes_per_patch
    for shard in manifest.shards:
        if shard.codebook_id not in known:
            raise FormatError(
                f"{where}: {shard.name} has codebook {shard.codebook_id!r}, which the manifest "
                "does not list; fetch both anew"
            )
        if shard.patches * size >= shard.bytes:
            raise FormatError(f"{where}: {shard.name} cannot hold {shard.patches} patches")
        labelled = sum(shard.labels.values())
        if not classes.issuperset(shard.labels) or max(labelled, shard.packs) > shard.patches:
            raise FormatError(f"{where}: counts of {shard.name} contradict each other")
