"""The columns member of a pack: one Parquet row a patch, in the order of the codes."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from latentds.errors import FormatError
from latentds.sources.patch import Patch

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
MAX_COLUMNS_BYTES = 1 << 28


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
    encoded: bytes, rows: int, where: str, columns: Sequence[str] | None = None
) -> pa.Table:
    """The table of a columns or masks member; FormatError unless it has `rows` rows."""
    try:
        file = pq.ParquetFile(pa.BufferReader(encoded))
        if file.metadata.num_rows != rows:
            raise FormatError(f"{where}: {file.metadata.num_rows} rows for {rows} patches")
        names = file.schema_arrow.names
        missing = set(columns or ()) - set(names)
        if missing:
            raise FormatError(f"{where}: no column {sorted(missing)}; it has {names}")
        table: pa.Table = file.read(columns=list(columns) if columns else None, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise FormatError(f"{where}: not a Parquet table ({str(error).splitlines()[0]})") from error
    if table.num_rows != rows:
        raise FormatError(f"{where}: {table.num_rows} rows for {rows} patches")
    return table


def encode_masks(patches: Sequence[Patch]) -> bytes | None:
    """The masks member of a pack: PNG bytes a patch, null for none; None where no patch has one."""
    if all(patch.mask_png is None for patch in patches):
        return None
    return encode_table(pa.table({"mask_png": [p.mask_png for p in patches]}, schema=MASK_SCHEMA))
