"""Export a data set to what other tools read: Parquet, or a tree of npy files."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from latentds.core.display import csv_cell, progress, shortest, visible
from latentds.core.storage import canonical_json, write_atomically
from latentds.edit.outputs import new_folder
from latentds.quantizers.codebooks import StoredCodebook, save_codebook
from latentds.quantizers.scalar import dequantize_each
from latentds.store.format import FORMAT, NO_LABEL
from latentds.store.index import UNKNOWN_PX
from latentds.store.packs import MASK_SCHEMA
from latentds.store.reader import ShardSet

logger = logging.getLogger(__name__)

BLOCK_PATCHES = 1024
FILE_BYTES = 512 * 1_000_000  # of codes, a Parquet file
CONTRACT = ".latentds/contract.json"  # a dot folder: `datasets` leaves it alone
TABLE = "table.csv"
FIELDS = (
    *("path", "label", "slide", "x", "y", "mpp", "split", "source"),
    *("source_encoding", "size_px", "codebook_id"),
)
MAX_NAME = 120  # bytes a folder or file may have here; most file systems end at 255
UNSAFE = re.compile(r'[/\\:*?"<>|~]')  # what leads elsewhere, or some file system has no name with
# To Windows no file's name.
DEVICE = re.compile(r"(?i)^(?:con(?:in\$|out\$)?|prn|aux|nul|(?:com|lpt)[\d¹²³])(?= *(?:\.|$))")
AMBIGUOUS = re.compile(r"__|_/|/_|^/|/$")  # where `/` as `__` could be read in two ways


def blocks(
    chosen: Mapping[str, np.ndarray | range], most: int, **words: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Rows by split, at most so many at a time, with a progress bar that says `words`."""
    with progress(total=sum(map(len, chosen.values())), **words) as bar:
        for split, rows in chosen.items():
            for start in range(0, len(rows), most):
                part = np.asarray(rows[start : start + most])
                yield split, part
                bar.update(len(part))


def export_parquet(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | None = None,
    overwrite: bool = False,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Write `OUT/data/SPLIT-NNNNN.parquet`, a patch a row, as `datasets` reads it.

    returns  patches written; the contract is in every file's metadata and in `.latentds/`
    """
    shards = ShardSet(folder)
    splits = [split] if split else sorted(shards.manifest.splits)
    size = shards.manifest.contract.bytes_per_patch
    schema = parquet_schema(shards)
    with new_folder(Path(out), overwrite, sources_of(folder)) as target:
        write_contract(shards, target)
        write_atomically(target / "README.md", parquet_card(splits).encode())
        (target / "data").mkdir()
        count, rows_a_file = 0, BLOCK_PATCHES * -(-file_bytes // (size * BLOCK_PATCHES))
        for name in splits:
            first, end = shards.patch_range(name)
            for number, start in enumerate(range(first, end, rows_a_file)):
                path = target / "data" / f"{name}-{number:05d}.parquet"
                part = {name: range(start, min(start + rows_a_file, end))}
                with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                    for _, rows in blocks(part, BLOCK_PATCHES, desc=path.name, unit="patch"):
                        writer.write_table(parquet_rows(shards, name, rows, schema))
                        count += len(rows)
    return count


def parquet_card(splits: Sequence[str]) -> str:
    """README.md: YAML that keeps the splits' names for `datasets`, and what a row is."""
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in splits:
        lines += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    text = (
        "A patch a row, exported from a latentds data set: `codes` are uint8, as stored; what they "
        f"mean by the codebook of `codebook_id` is told by the contracts in `{CONTRACT}`. "
        "`mask_png`, if there, is a patch's mask as a grey PNG."
    )
    return "\n".join([*lines, "---", "", text, ""])


def parquet_schema(shards: ShardSet) -> pa.Schema:
    """Columns of the exported rows; what the codes mean is the schema's metadata."""
    size = shards.manifest.contract.bytes_per_patch
    fields = [("key", pa.string()), ("codes", pa.binary(size))]
    fields += [(name, pa.string()) for name in ("label", "slide")]
    fields += [
        ("x", pa.int32()),
        ("y", pa.int32()),
        ("mpp", pa.float32()),
        ("size_px", pa.uint32()),
    ]
    fields += [(n, pa.string()) for n in ("split", "source", "source_encoding", "codebook_id")]
    fields += MASK_SCHEMA if shards.columns.has_masks else []
    return pa.schema(fields, metadata={"latentds": canonical_json(contracts(shards))})


def parquet_rows(shards: ShardSet, split: str, rows: np.ndarray, schema: pa.Schema) -> pa.Table:
    known = read_rows(shards, split, rows)
    columns: dict[str, Any] = {name: [row[name] for row in known] for name in known[0]}
    codes = shards.read_codes(rows)
    flat = pa.py_buffer(codes.reshape(-1))
    columns["codes"] = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(codes[0].size), len(codes), [None, flat]
    )
    if shards.columns.has_masks:
        columns["mask_png"] = shards.columns.mask_pngs(rows)
    return pa.table(columns, schema=schema)


def contracts(shards: ShardSet) -> dict[str, Any]:
    """What the codes of every codebook mean, by codebook_id."""
    manifest = shards.manifest
    numbers = {number: shard for shard, number in enumerate(manifest.codebook_numbers)}
    return {
        "format": FORMAT,
        "dataset_id": manifest.dataset_id,
        "contracts": {
            manifest.codebooks[number].codebook_id: manifest.contract_of(shard).to_json()
            for number, shard in sorted(numbers.items())
        },
    }


def write_contract(shards: ShardSet, target: Path) -> None:
    text = json.dumps(contracts(shards), indent=1, sort_keys=True) + "\n"
    write_atomically(target / CONTRACT, text.encode())


def export_npy(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    split: str | None = None,
    latents: bool = False,
    overwrite: bool = False,
) -> int:
    """Write `OUT/SPLIT/LABEL/SLIDE/KEY.npy`, a patch a file, and `table.csv` with their columns.

    latents  float32 (C, h, w) that the codebook gives instead of uint8 codes; codes come
             with their codebooks as `codebook-ID.safetensors`
    returns  patches written
    """
    shards = ShardSet(folder)
    tell_of_masks(shards)
    splits = [split] if split else sorted(shards.manifest.splits)
    count = 0
    with new_folder(Path(out), overwrite, sources_of(folder)) as target:
        write_contract(shards, target)
        if not latents:
            save_codebooks(shards, target)
        with (target / TABLE).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(FIELDS)
            chosen = {name: range(*shards.patch_range(name)) for name in splits}
            for name, rows in blocks(chosen, BLOCK_PATCHES, desc="patches", unit="patch"):
                values = shards.read_codes(rows)
                if latents:
                    numbers, books = shards.codebook_numbers(rows), shards.manifest.codebooks
                    values = dequantize_each(torch.from_numpy(values), numbers, books).numpy()
                for row, value in zip(read_rows(shards, name, rows), values, strict=True):
                    within = patch_path(row["label"], row["slide"], row["key"], ".npy")
                    path = f"{name}/{within}"
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    np.save(target / path, value)
                    table.writerow(map(csv_cell, table_line(path, row, FIELDS)))
                count += len(rows)
    return count


def tell_of_masks(shards: ShardSet) -> None:
    """Say that files a patch leave the masks out."""
    if shards.columns.has_masks:
        text = "%s: its masks are not written; 'latentds export --to parquet' writes them"
        logger.warning(text, shards.folder)


def save_codebooks(shards: ShardSet, target: Path) -> None:
    """Every codebook as a file that `latentds import --codebook` takes."""
    manifest = shards.manifest
    for book in manifest.codebooks:
        name = f"codebook-{book.codebook_id.removeprefix('sha256:')[:12]}.safetensors"
        made = {"origin": "exported from a data set", "dataset_id": manifest.dataset_id}
        stored = StoredCodebook(codebook=book, latent_id=manifest.contract.latent_id, made=made)
        save_codebook(stored, target / name)


def sources_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The folder that must not be written into; none where it is a location."""
    return [] if "://" in str(folder) else [Path(folder)]


def read_rows(shards: ShardSet, split: str, rows: np.ndarray) -> list[dict[str, Any]]:
    """What is known of every patch, by the names of FIELDS and `key`; None where it is not."""
    manifest, table = shards.manifest, shards.patches[rows]
    columns = shards.read_columns(rows, ("key", "source", "source_encoding"))
    books = [book.codebook_id for book in manifest.codebooks]
    numbers = shards.codebook_numbers(rows).tolist()
    return [
        {
            "key": columns["key"][place],
            "label": manifest.classes[row["label"]] if row["label"] != NO_LABEL else None,
            "slide": manifest.slides[row["slide"]] if row["slide"] >= 0 else None,
            "x": int(row["x"]) if row["x"] != UNKNOWN_PX else None,
            "y": int(row["y"]) if row["y"] != UNKNOWN_PX else None,
            "mpp": None if np.isnan(row["mpp"]) else shortest(row["mpp"]),
            "size_px": int(row["size_px"]) or None,
            "split": split,
            "source": columns["source"][place],
            "source_encoding": columns["source_encoding"][place],
            "codebook_id": books[numbers[place]],
        }
        for place, row in enumerate(table)
    ]


def table_line(path: str, row: dict[str, Any], fields: Sequence[str]) -> list[Any]:
    """A patch's line in table.csv, empty where something is unknown."""
    known = row | {"path": path}
    return ["" if known[name] is None else known[name] for name in fields]


def patch_path(label: str | None, slide: str | None, key: str, suffix: str) -> str:
    """`LABEL/SLIDE/KEY.SUFFIX`, levels that are None left out: distinct for distinct keys.

    Folders keep the names' own letters and spaces. No part leads out of its folder.
    """
    folders = [folder_name(name) for name in (label, slide) if name is not None]
    return "/".join([*folders, f"{file_stem(key)}{suffix}"])


def folder_name(name: str) -> str:
    """A name as one plain folder's; a hash tells apart what had to be changed."""
    plain = UNSAFE.sub("_", visible(name)).encode()[:MAX_NAME].decode(errors="ignore").strip(". ")
    plain = DEVICE.sub(r"\g<0>_", plain)
    return plain if plain == name and plain else f"{plain or '_'}-{short_hash(name)}"


def file_stem(key: str) -> str:
    """A patch's key as one file name without a suffix: folders of its source become `__`."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", key.replace("/", "__"))
    if plain and not (AMBIGUOUS.search(key) or DEVICE.match(plain)) and len(plain) <= MAX_NAME:
        return plain
    return f"{plain[-MAX_NAME:] or '_'}-{short_hash(key)}"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
