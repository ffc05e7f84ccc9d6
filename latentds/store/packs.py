"""Packs as members of a tar: codes, and as Parquet columns and masks, a row a patch.

Written as the format has them; read from a shard's first byte to its last, trusting nothing in it.
"""
# N patches of a pack, C latent channels, h w latent cells

from __future__ import annotations

import hashlib
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentds.core.storage import canonical_json, naming, open_regular, parse_json, rename_durably
from latentds.errors import FormatError, first_words
from latentds.store.format import (
    CODES,
    FORMAT,
    HEADER_PREFIX,
    MASKS,
    MEMBER_PATTERN,
    MEMBERS,
    PATCHES,
    Contract,
    check_format,
    check_npy,
    npy_header,
)
from latentds.store.patch_record import Patch

COLUMNS = {  # of a pack, and the field of a patch that each has
    "label": ("label", pa.string()),
    "slide": ("slide", pa.string()),
    "x": ("x_px_level0", pa.int32()),
    "y": ("y_px_level0", pa.int32()),
    "mpp": ("mpp", pa.float32()),
    "size_px": ("size_px_level0", pa.uint32()),
    "source": ("source", pa.string()),
    "source_encoding": ("source_encoding", pa.string()),
}
SCHEMA = pa.schema([(name, kind) for name, (_, kind) in COLUMNS.items()])
MASK_SCHEMA = pa.schema([("mask_png", pa.binary())])
MAX_COLUMNS_BYTES = 1 << 27  # decompressed; a pack of 65,536 patches has some 20 MB of columns
BLOCK = 512
RECORD = 10_240  # POSIX: a tar ends on a multiple of 20 blocks
MAX_HEADER_BYTES = 1 << 24  # an additive codebook of 32 planes and 32 channels takes 1.4 MB
READ_BYTES = 1 << 20
NPY_HEAD_BYTES = 4096  # a codes header has 128; numpy refuses longer than 10,000


def patches_table(patches: Sequence[Patch]) -> pa.Table:
    """The columns of a pack's patches; a key is not among them, it follows from source, x and y."""
    rows = {name: [getattr(p, field) for p in patches] for name, (field, _) in COLUMNS.items()}
    return pa.table(rows, schema=SCHEMA)


def encode_table(table: pa.Table) -> bytes:
    """Parquet bytes, zstd, one row group, no statistics: small for packs of a few hundred rows."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=9,
        use_dictionary=[n for n in ("label", "source_encoding") if n in table.schema.names],
        write_statistics=False,
        store_schema=False,
    )
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def decode_table(
    encoded: bytes,
    where: str,
    schema: pa.Schema,
    rows: int | None = None,
    columns: Sequence[str] | None = None,
    most_bytes: int = MAX_COLUMNS_BYTES,
) -> pa.Table:
    """Columns of a Parquet member; FormatError unless they have the schema's types and `rows` rows.

    Sizes that the metadata announce are checked before anything is decompressed.
    """
    wanted = list(columns or schema.names)
    try:
        file = pq.ParquetFile(pa.BufferReader(encoded))
        if rows not in (None, file.metadata.num_rows):  # nulls take no bytes until they are read
            raise FormatError(f"{where}: {file.metadata.num_rows} rows for {rows} patches")
        found = file.schema_arrow
        for name in wanted:
            if name not in found.names:
                raise FormatError(f"{where}: no column {name!r}; it has {found.names}")
            seen, expected = found.field(name).type, schema.field(name).type
            if seen != expected:
                raise FormatError(f"{where}: column {name!r} is {seen}, not {expected}")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        chunks = (group.column(i) for group in groups for i in range(group.num_columns))
        announced = sum(chunk.total_uncompressed_size for chunk in chunks)
        if announced > most_bytes:
            raise FormatError(f"{where}: would decompress to {announced} bytes; refused")
        table: pa.Table = file.read(columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise FormatError(f"{where}: not a Parquet table ({first_words(error)})") from error
    if rows is not None and table.num_rows != rows:
        raise FormatError(f"{where}: {table.num_rows} rows for {rows} patches")
    return table


def encode_masks(masks: pa.Array | pa.ChunkedArray) -> bytes | None:
    """The masks member of a pack: PNG bytes a patch, null for none; None where no patch has one."""
    if masks.null_count == len(masks):
        return None
    return encode_table(pa.table([masks], schema=MASK_SCHEMA))


class Pack(NamedTuple):
    """N patches as they are stored.

    key      dot-free ASCII
    codes    uint8 (N, C, h, w)
    patches  Parquet bytes of the columns
    masks    Parquet bytes of the masks, None for none
    """

    key: str
    codes: np.ndarray
    patches: bytes
    masks: bytes | None = None


def global_header(contract: Contract) -> bytes:
    """The PAX global header that opens a shard: other tar readers skip it."""
    fields = {
        "format": FORMAT,
        "encoding": contract.encoding,
        "latent_id": contract.latent_id,
        "codebook_id": contract.codebook.codebook_id,
        "decoder_id": contract.decoder_id,
        "contract": canonical_json(contract.to_json()),
    }
    return tarfile.TarInfo.create_pax_global_header(
        {f"{HEADER_PREFIX}{name}": value for name, value in fields.items()}
    )


def member_bytes(name: str, content: bytes) -> bytes:
    """A tar member: header, content, padding."""
    return member_header(name, len(content)) + content + bytes(-len(content) % BLOCK)


def member_header(name: str, size: int) -> bytes:
    """A tar member's header, without times or owners."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


class ShardWriter:
    """A shard being written under a temporary name; `finish` gives it its own.

    path         final path
    contract     goes into the global header
    resume_at    length of what an earlier process is known to have written and synced; 0 starts
                 anew
    """

    def __init__(self, path: Path, contract: Contract, resume_at: int = 0) -> None:
        self.path, self.temporary = path, path.with_name(f"{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO = self.temporary.open("r+b" if resume_at else "wb")
        if resume_at:
            self.file.truncate(resume_at)  # whatever came after the last synced block is dropped
            self.file.seek(resume_at)
        else:
            with naming(self.path):
                self.file.write(global_header(contract))

    def add(self, pack: Pack) -> None:
        """Append a pack, its members in the format's order."""
        key, codes = pack.key, np.ascontiguousarray(pack.codes)
        if codes.dtype != np.uint8 or codes.ndim < 2 or not len(codes):
            raise FormatError(
                f"pack {key}: codes are {codes.dtype} {codes.shape}, not uint8 (N, *codes_shape)"
            )
        members = {CODES: npy_header(codes.shape) + codes.tobytes()}
        members |= {MASKS: pack.masks} if pack.masks is not None else {}
        members[PATCHES] = pack.patches
        with naming(self.path):
            for kind, content in members.items():
                self.file.write(member_bytes(f"{key}.{kind}", content))

    def sync(self) -> int:
        """Make what was added durable; returns the length that `resume_at` may name."""
        with naming(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        return self.file.tell()

    def finish(self) -> None:
        """Close the tar, sync it, give it its name."""
        end = self.file.tell() + 2 * BLOCK
        with naming(self.path):
            self.file.write(bytes(2 * BLOCK + -end % RECORD))
            self.sync()
            self.file.close()
        rename_durably(self.temporary, self.path)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path):
            self.file.close()  # flushes what a full disk did not take


class Member(NamedTuple):
    """A regular file in a tar: its pack's key, its kind, and where its bytes lie."""

    key: str
    kind: str
    offset: int
    size: int


class ScannedPack(NamedTuple):
    """A pack as found in a shard.

    row        its fields of PACK_DTYPE, offsets from the shard's start
    digests    sha256 by field of DIGEST_DTYPE
    checksums  CRC-32 of every patch's codes, (N,)
    """

    key: str
    row: dict[str, int]
    digests: dict[str, bytes]
    checksums: tuple[int, ...]


def read_contract(path: Path) -> Contract:
    """The contract in a shard's global header; enough to decode it without its manifest."""
    where = str(path)
    with open_regular(path, where) as file:
        fields = read_global_header(file, where)
    check_format(fields.get(f"{HEADER_PREFIX}format"), where)
    try:
        text = fields[f"{HEADER_PREFIX}contract"]
        record = parse_json(text.encode(errors="surrogateescape"), where)
    except (KeyError, FormatError) as error:
        raise FormatError(f"{where}: no readable contract in its header; fetch it anew") from error
    return Contract.from_json(record, where)


def read_global_header(file: BinaryIO, where: str) -> dict[str, str]:
    """Fields of the PAX global header at the file's start; the file is left behind it."""
    info = read_header(file, where)
    if info is None or info.type != tarfile.XGLTYPE:
        raise FormatError(f"{where}: no PAX global header; not a latentds shard")
    if not 0 <= info.size <= MAX_HEADER_BYTES:
        raise FormatError(f"{where}: global header of {info.size} bytes; refused")
    record = file.read(info.size + -info.size % BLOCK)[: info.size]
    fields, start = dict[str, str](), 0
    try:  # lines `length key=value`
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
            f"{where}: no tar header at byte {offset} ({error}); fetch it anew"
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
        seen: set[str] = set()
        members = scan_members(file, str(path))
        for key, named in itertools.groupby(members, lambda member: member.key):
            group: dict[str, Member] = {}
            for member in named:
                if member.kind == CODES and (key in seen or group):
                    raise FormatError(f"{path}, {key}: a second pack of this key; refused")
                group[member.kind] = member
            seen.add(key)
            if group.keys() & set(MEMBERS):
                yield scan_pack(file, group, contract, f"{path}, {key}")


def scan_pack(
    file: BinaryIO, group: dict[str, Member], contract: Contract, where: str
) -> ScannedPack:
    """Check one pack's members and checksum its codes."""
    for kind in (CODES, PATCHES):
        if kind not in group:
            raise FormatError(f"{where}: no {kind} member; fetch the shard anew")
    codes = group[CODES]
    file.seek(codes.offset)
    head = file.read(min(codes.size, NPY_HEAD_BYTES))
    count = check_npy(head, codes.size, contract.codes_shape, where)
    size = count * contract.bytes_per_patch
    places = {"codes": (codes.offset + codes.size - size, size)}
    for field, kind in (("patches", PATCHES), ("masks", MASKS)):
        if kind in group:
            places[field] = group[kind].offset, group[kind].size
    row, digests = {"count": count}, {"masks": bytes(32)}
    for field, (offset, size) in places.items():
        row |= {f"{field}_offset": offset, f"{field}_bytes": size}
        row[f"{field}_crc32"], digests[field] = summarize_bytes(file, offset, size)
    checksums = check_codes(file, row["codes_offset"], count, contract, where)
    return ScannedPack(group[CODES].key, row, digests, checksums)


def check_codes(
    file: BinaryIO, offset: int, count: int, contract: Contract, where: str
) -> tuple[int, ...]:
    """CRC-32 of every patch's codes, (N,); refuses codes the codebook has no entry for."""
    size = contract.bytes_per_patch
    file.seek(offset)
    sums: list[int] = []
    for start in range(0, count, step := max(1, READ_BYTES // size)):
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
    while size and (block := file.read(min(size, READ_BYTES))):
        crc32 = zlib.crc32(block, crc32)
        digest.update(block)
        size -= len(block)
    return crc32, digest.digest()


def read_member(path: Path, pack: ScannedPack, field: str) -> bytes:
    """The bytes of a pack's columns or masks, by field of DIGEST_DTYPE."""
    size = pack.row[f"{field}_bytes"]
    if size > MAX_COLUMNS_BYTES:
        raise FormatError(f"{path}, {pack.key}: {field} of {size} bytes; refused")
    with open_regular(path, str(path)) as file:
        file.seek(pack.row[f"{field}_offset"])
        return file.read(size)
