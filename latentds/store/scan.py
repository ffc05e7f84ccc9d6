"""Walk a shard's tar from its first byte to its last, trusting nothing in it."""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from latentds.core.storage import open_regular, parse_json
from latentds.errors import FormatError
from latentds.store.format import (
    CODES,
    HEADER_PREFIX,
    MASKS,
    MEMBER_PATTERN,
    MEMBERS,
    PATCHES,
    Contract,
    check_format,
    check_npy,
)
from latentds.store.packs import BLOCK, MAX_COLUMNS_BYTES, SCHEMA, decode_table

MAX_HEADER_BYTES = 1 << 24  # an additive codebook of 32 planes and 32 channels takes 1.4 MB
BLOCK_BYTES = 1 << 20
NPY_HEAD_BYTES = 4096  # a codes header has 128; numpy refuses longer than 10,000


@dataclasses.dataclass(frozen=True)
class Member:
    """A regular file in a tar: its pack's key, its kind, and where its bytes lie."""

    key: str
    kind: str
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class ScannedPack:
    """A pack as found in a shard; offsets from the shard's start."""

    key: str
    count: int
    codes_offset: int
    codes_crc32: int
    patches: Member
    patches_crc32: int
    masks: Member | None
    masks_crc32: int
    digests: tuple[bytes, bytes, bytes]  # sha256 of codes, columns, masks
    checksums: tuple[int, ...]  # (N,), CRC-32 of every patch's codes


def read_contract(path: Path) -> Contract:
    """The contract in a shard's global header; enough to decode it without its manifest."""
    with open_regular(path, str(path)) as file:
        return parse_headers(read_global_header(file, str(path)), str(path))


def read_global_header(file: BinaryIO, where: str) -> dict[str, str]:
    """Fields of the PAX global header at the file's start; the file is left behind it."""
    info = read_header(file, where)
    if info is None or info.type != tarfile.XGLTYPE:
        raise FormatError(f"{where}: no PAX global header; not a latentds shard")
    if not 0 <= info.size <= MAX_HEADER_BYTES:
        raise FormatError(f"{where}: global header of {info.size} bytes; refused")
    padded = info.size + -info.size % BLOCK
    record = file.read(padded)
    if len(record) != padded:
        raise FormatError(f"{where}: ends inside its global header; truncated, fetch it anew")
    return parse_pax(record[: info.size], where)


def parse_pax(record: bytes, where: str) -> dict[str, str]:
    """`length key=value` lines of a PAX header."""
    fields = {}
    start = 0
    try:
        while start < len(record):
            length = int(record[start : record.index(b" ", start, start + 12)])
            line = record[start : start + length]
            key, separator, value = line.partition(b" ")[2].partition(b"=")
            if length < 5 or not separator or line[-1:] != b"\n":
                raise ValueError("a record does not end where it says")
            fields[key.decode()] = value[:-1].decode()
            start += length
    except ValueError as error:
        raise FormatError(f"{where}: damaged global header; not a latentds shard") from error
    return fields


def parse_headers(fields: dict[str, str], where: str) -> Contract:
    """The contract among a global header's fields."""
    if not any(name.startswith(HEADER_PREFIX) for name in fields):
        raise FormatError(f"{where}: a tar, but not a latentds shard (no {HEADER_PREFIX}format)")
    check_format(fields.get(f"{HEADER_PREFIX}format"), where)
    try:
        text = fields[f"{HEADER_PREFIX}contract"]
        record = parse_json(text.encode(errors="surrogateescape"), where)
    except (KeyError, FormatError) as error:
        raise FormatError(f"{where}: no readable contract in its header; fetch it anew") from error
    return Contract.from_json(record, where)


def read_header(file: BinaryIO, where: str) -> tarfile.TarInfo | None:
    """The next tar header, None at the archive's end."""
    offset = file.tell()
    block = file.read(BLOCK)
    if len(block) == BLOCK and not any(block):
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError, OverflowError) as error:
        raise FormatError(
            f"{where}: no tar header at byte {offset} ({error}); truncated or not a tar, fetch it "
            "anew"
        ) from error


def scan_members(file: BinaryIO, where: str) -> Iterator[Member]:
    """The members after the global header; anything but a plain, well-named file is refused."""
    size = file.seek(0, 2)
    file.seek(0)
    read_global_header(file, where)
    while (info := read_header(file, where)) is not None:
        match = MEMBER_PATTERN.fullmatch(info.name)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not match:
            raise FormatError(
                f"{where}: member {info.name!r} is not a plain KEY.NAME file; refused"
            )
        offset = file.tell()
        end = offset + info.size + -info.size % BLOCK
        if info.size < 0 or end > size:
            raise FormatError(
                f"{where}, {info.name}: {info.size} bytes from byte {offset}, but the shard has "
                f"{size}; truncated, fetch it anew"
            )
        yield Member(match[1], match[2], offset, info.size)
        file.seek(end)


def scan_shard(path: Path, contract: Contract) -> Iterator[ScannedPack]:
    """Every pack of a shard, headers and checksums read; FormatError names file, key and value.

    Members of kinds this reader does not know are passed over (the version rule allows them).
    """
    with open_regular(path, str(path)) as file:
        group: dict[str, Member] = {}
        seen: set[str] = set()
        for member in scan_members(file, str(path)):
            if group and member.key not in {m.key for m in group.values()}:
                yield scan_pack(file, group, contract, path)
                group = {}
            if member.kind == CODES and member.key in seen:
                raise FormatError(f"{path}, {member.key}: a second pack of this key; refused")
            seen.add(member.key)
            if member.kind in MEMBERS:
                group[member.kind] = member
        if group:
            yield scan_pack(file, group, contract, path)


def scan_pack(
    file: BinaryIO, group: dict[str, Member], contract: Contract, path: Path
) -> ScannedPack:
    """Check one pack's members and checksum its codes."""
    key = next(iter(group.values())).key
    where = f"{path}, {key}"
    for kind in (CODES, PATCHES):
        if kind not in group:
            raise FormatError(f"{where}: no {kind} member; fetch the shard anew")
    codes = group[CODES]
    file.seek(codes.offset)
    head = file.read(min(codes.size, NPY_HEAD_BYTES))
    count = check_npy(head, codes.size, contract.codes_shape, where)
    code_bytes = count * contract.bytes_per_patch
    codes_offset = codes.offset + codes.size - code_bytes
    crc32, digest = summarize_bytes(file, codes_offset, code_bytes)
    checksums = check_codes(file, codes_offset, count, contract, where)
    patches, masks = group[PATCHES], group.get(MASKS)
    columns_crc32, columns_digest = summarize_bytes(file, patches.offset, patches.size)
    masks_crc32, masks_digest = 0, bytes(32)
    if masks:
        masks_crc32, masks_digest = summarize_bytes(file, masks.offset, masks.size)
    return ScannedPack(
        key=key,
        count=count,
        codes_offset=codes_offset,
        codes_crc32=crc32,
        patches=patches,
        patches_crc32=columns_crc32,
        masks=masks,
        masks_crc32=masks_crc32,
        digests=(digest, columns_digest, masks_digest),
        checksums=checksums,
    )


def check_codes(
    file: BinaryIO, offset: int, count: int, contract: Contract, where: str
) -> tuple[int, ...]:
    """CRC-32 of every patch's codes, (N,); refuses codes the codebook has no entry for."""
    size = contract.bytes_per_patch
    file.seek(offset)
    sums: list[int] = []
    for start in range(0, count, step := max(1, BLOCK_BYTES // size)):
        patches = min(step, count - start)
        codes = np.frombuffer(file.read(patches * size), np.uint8)
        fault = contract.codebook.find_fault(codes.reshape(patches, *contract.codes_shape))
        if fault is not None:
            raise FormatError(f"{where}: {fault}")
        sums += [zlib.crc32(patch.data) for patch in codes.reshape(patches, size)]
    return tuple(sums)


def summarize_bytes(file: BinaryIO, offset: int, size: int) -> tuple[int, bytes]:
    """zlib's crc32 and the sha256 of `size` bytes from `offset`, read in blocks."""
    file.seek(offset)
    crc32 = 0
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, BLOCK_BYTES))):
        crc32 = zlib.crc32(block, crc32)
        digest.update(block)
        size -= len(block)
    return crc32, digest.digest()


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a columns or masks member, refused where it is larger than one can be."""
    if member.size > MAX_COLUMNS_BYTES:
        raise FormatError(f"{path}, {member.key}.{member.kind}: {member.size} bytes; refused")
    with open_regular(path, str(path)) as file:
        file.seek(member.offset)
        return file.read(member.size)


def read_patches(path: Path, pack: ScannedPack, columns: Sequence[str]) -> pa.Table:
    """Columns of a scanned pack, one row a patch."""
    where = f"{path}, {pack.key}.{PATCHES}"
    table: pa.Table = decode_table(
        read_member(path, pack.patches), where, SCHEMA, pack.count, columns
    )
    return table
