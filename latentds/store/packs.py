"""Packs as members of a tar: codes, and as Parquet columns and masks, a row a patch."""
# N patches of a pack, C latent channels, h w latent cells

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from latentds.core.storage import canonical_json, naming, open_picture, rename_durably
from latentds.errors import FormatError, InputError, first_words
from latentds.store.format import CODES, FORMAT, HEADER_PREFIX, MASKS, PATCHES, Contract, npy_header
from latentds.store.manifest import Manifest
from latentds.store.patch_record import Patch

SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("slide", pa.string()),
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("mpp", pa.float32()),
        ("size_px", pa.uint32()),
        ("source", pa.string()),
        ("source_encoding", pa.string()),
    ]
)
MASK_SCHEMA = pa.schema([("mask_png", pa.binary())])
MAX_COLUMNS_BYTES = 1 << 27  # decompressed; a pack of 65,536 patches has some 20 MB of columns
NUMBERS = ("x", "y", "mpp", "size_px")
BLOCK = 512
RECORD = 10_240  # POSIX: a tar ends on a multiple of 20 blocks


def patches_table(patches: Sequence[Patch]) -> pa.Table:
    """The columns of a pack's patches; a key is not among them, it follows from source, x and y."""
    rows = {
        "label": [p.label for p in patches],
        "slide": [p.slide for p in patches],
        "x": [p.x_px_level0 for p in patches],
        "y": [p.y_px_level0 for p in patches],
        "mpp": [p.mpp for p in patches],
        "size_px": [p.size_px_level0 for p in patches],
        "source": [p.source for p in patches],
        "source_encoding": [p.source_encoding for p in patches],
    }
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
        if rows is not None and file.metadata.num_rows != rows:
            raise FormatError(f"{where}: {file.metadata.num_rows} rows for {rows} patches")
        check_schema(file.schema_arrow, schema, wanted, where)
        check_announced_bytes(file.metadata, where, most_bytes)
        table: pa.Table = file.read(columns=wanted, use_threads=False)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise FormatError(f"{where}: not a Parquet table ({first_words(error)})") from error
    if rows is not None and table.num_rows != rows:
        raise FormatError(f"{where}: {table.num_rows} rows for {rows} patches")
    return table


def check_schema(found: pa.Schema, schema: pa.Schema, wanted: Sequence[str], where: str) -> None:
    """Refuse missing columns and columns of other types; more columns than wanted are allowed."""
    for name in wanted:
        if name not in found.names:
            raise FormatError(f"{where}: no column {name!r}; it has {found.names}")
        seen, expected = found.field(name).type, schema.field(name).type
        if seen != expected:
            raise FormatError(f"{where}: column {name!r} is {seen}, not {expected}")


def check_announced_bytes(metadata: pq.FileMetaData, where: str, most_bytes: int) -> None:
    """Refuse tables that would decompress to more than one can hold."""
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    chunks = (group.column(i) for group in groups for i in range(group.num_columns))
    announced = sum(chunk.total_uncompressed_size for chunk in chunks)
    if announced > most_bytes:
        raise FormatError(f"{where}: would decompress to {announced} bytes; refused")


def encode_masks(masks: pa.Array | pa.ChunkedArray) -> bytes | None:
    """The masks member of a pack: PNG bytes a patch, null for none; None where no patch has one."""
    if masks.null_count == len(masks):
        return None
    return encode_table(pa.table([masks], schema=MASK_SCHEMA))


def named(numbers: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    """Numbers of names as the names; null for -1."""
    places = pa.array(numbers.astype(np.int32), mask=numbers < 0)
    return pa.DictionaryArray.from_arrays(places, pa.array(list(names), pa.string()))


def numbered(name: str, stored: np.ndarray) -> pa.Array:
    """x, y, mpp or size_px of patches; null where unknown."""
    unknown = stored == 0 if name == "size_px" else ~(stored >= 0)  # NaN is not >= 0 either
    return pa.array(stored, mask=unknown)


def patch_columns(rows: np.ndarray, stored: np.ndarray, manifest: Manifest) -> pa.Table:
    """Row, split, label, slide, x, y, mpp and size_px of patches.

    stored  PATCH_DTYPE, of these rows
    """
    ends = np.cumsum(list(manifest.splits.values()))
    columns = {
        "row": pa.array(rows),
        "split": named(np.searchsorted(ends, rows, side="right"), list(manifest.splits)),
        "label": named(stored["label"], manifest.classes),
        "slide": named(stored["slide"], manifest.slides),
    }
    return pa.table(columns | {name: numbered(name, stored[name]) for name in NUMBERS})


def no_mask(where: str) -> InputError:
    """The error of a patch without a mask where every one needs it: zeros would be a class."""
    return InputError(f"{where} has no mask; give it one, or leave the patch out")


def decode_mask(encoded: bytes, size_px: tuple[int, int], where: str) -> np.ndarray:
    """A mask (H, W) from its PNG bytes, size checked before a pixel is decoded."""
    try:
        with open_picture(io.BytesIO(encoded), ["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pack:
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


def pack_bytes(pack: Pack) -> bytes:
    """The members of a pack, in the format's order."""
    codes = np.ascontiguousarray(pack.codes)
    if codes.dtype != np.uint8 or codes.ndim < 2 or not len(codes):
        raise FormatError(
            f"pack {pack.key}: codes are {codes.dtype} {codes.shape}, not uint8 (N, *codes_shape)"
        )
    members = [member_bytes(f"{pack.key}.{CODES}", npy_header(codes.shape) + codes.tobytes())]
    if pack.masks is not None:
        members.append(member_bytes(f"{pack.key}.{MASKS}", pack.masks))
    members.append(member_bytes(f"{pack.key}.{PATCHES}", pack.patches))
    return b"".join(members)


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
        """Append a pack."""
        with naming(self.path):
            self.file.write(pack_bytes(pack))

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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with naming(self.path):
            self.file.close()  # flushes what a full disk did not take
