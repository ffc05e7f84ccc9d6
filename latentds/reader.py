"""Read a data set's folder: memory-mapped tables, and codes of any patches in any order."""
# N patches asked for, C latent channels, h w latent cells, H W pixels

from __future__ import annotations

import io
import mmap
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latentds.errors import DamagedPackError, FormatError, unknown_name
from latentds.format import (
    MASKS,
    NPY_ERRORS,
    PACK_DTYPE,
    PACKS_TABLE,
    PATCH_DTYPE,
    PATCHES,
    PATCHES_TABLE,
    pack_key,
    patch_key,
)
from latentds.manifest import Manifest, read_manifest

MAX_OPEN_SHARDS = 256
MAX_VIEWS = 1024  # packs at hand without a look into the tables
MAX_CACHED_TABLES = 256  # Parquet members that stay parsed
TABLE_HEAD_BYTES = 4096


class ShardSet:
    """The shards, tables and manifest of a data set's folder.

    folder       local folder
    check_codes  compare a pack's checksum the first time this process reads from it
    manifest     instead of the folder's own, while it is not yet written

    revision     commit or manifest that a location resolved to; None for a local folder

    Opening costs the manifest and one `stat` a shard, whatever the number of patches; it raises
    FormatError for anything that contradicts the manifest. Pickles without its maps, so workers may
    carry it.
    """

    revision: str | None = None

    def __init__(
        self,
        folder: str | os.PathLike[str],
        check_codes: bool = True,
        manifest: Manifest | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = manifest or read_manifest(self.folder)
        self.check_codes = check_codes
        check_sizes(self.folder, self.manifest)
        self.packs = open_table(self.folder / PACKS_TABLE, PACK_DTYPE, self.manifest.packs)
        self.patches = open_table(self.folder / PATCHES_TABLE, PATCH_DTYPE, self.manifest.patches)
        # A field of the table is strided: a binary search on it would copy it for every batch.
        self.first_patch = np.ascontiguousarray(self.packs["first_patch"])
        self.first_pack = np.cumsum([0, *(shard.packs for shard in self.manifest.shards)])
        self.check_boundaries()
        self.reset()

    def check_boundaries(self) -> None:
        """Refuse a pack table whose shards do not start and end where the manifest counts say."""
        shards = self.manifest.shards
        first_patch = np.cumsum([0, *(shard.patches for shard in shards)])
        starts, ends = self.first_pack[:-1], self.first_pack[1:] - 1
        numbers = np.arange(len(shards))
        last = self.packs[ends]
        if not (
            np.array_equal(self.packs["shard"][starts], numbers)
            and np.array_equal(last["shard"], numbers)
            and np.array_equal(self.first_patch[starts], first_patch[:-1])
            and np.array_equal(last["first_patch"] + last["count"], first_patch[1:])
        ):
            raise FormatError(
                f"{self.folder / PACKS_TABLE}: shards do not start and end where the manifest "
                "says; fetch both anew"
            )

    def reset(self) -> None:
        """Start without maps and caches."""
        self.maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.views: dict[int, memoryview] = {}
        self.tables: OrderedDict[tuple[int, str], dict[str, list[Any]]] = OrderedDict()
        # Shared with workers: a pack that one of them has checked need not be checked by all.
        self.share_checks(torch.zeros(len(self.packs), dtype=torch.bool).share_memory_())  # type: ignore[no-untyped-call]

    def share_checks(self, marks: torch.Tensor) -> None:
        """Keep in `marks` (bool, a pack) which packs were found sound."""
        self.marks, self.checked = marks, marks.numpy()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "check_codes": self.check_codes, "marks": self.marks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["check_codes"])  # type: ignore[misc]
        self.share_checks(state["marks"])

    def __len__(self) -> int:
        return self.manifest.patches

    def key(self, pack: int) -> str:
        """Key of a pack: split, shard number and place in the shard."""
        shard = self.manifest.shards[int(self.packs["shard"][pack])]
        number = int(shard.name.removesuffix(".tar").rpartition("-")[2])
        first = int(self.first_pack[self.packs["shard"][pack]])
        return pack_key(shard.split, number, pack - first)

    def patch_range(self, split: str) -> tuple[int, int]:
        """First row of a split in the patch table, and one past its last."""
        first_pack, end_pack = self.manifest.pack_range(split)
        last = self.packs[end_pack - 1]
        return int(self.packs["first_patch"][first_pack]), int(last["first_patch"] + last["count"])

    def read_codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes uint8 (N, C, h, w) of the patches at `rows` of the patch table, in that order."""
        contract = self.manifest.contract
        size = contract.bytes_per_patch
        codes = np.empty((len(rows), *contract.codes_shape), np.uint8)
        packs = self.packs_of(rows)
        starts = ((rows - self.first_patch[packs].astype(np.int64)) * size).tolist()
        views = {pack: self.pack_bytes(pack) for pack in np.unique(packs).tolist()}
        # A loop of memory copies: 3 times as fast as indexing every pack's few patches as an array.
        target, place = codes.reshape(-1).data, 0
        for pack, start in zip(packs.tolist(), starts, strict=True):
            target[place : place + size] = views[pack][start : start + size]
            place += size
        return codes

    def packs_of(self, rows: np.ndarray) -> np.ndarray:
        """The packs that hold rows of the patch table; FormatError where the tables disagree."""
        packs = np.searchsorted(self.first_patch, rows.astype(np.uint64), side="right") - 1
        beyond = rows - self.first_patch[packs].astype(np.int64) >= self.packs["count"][packs]
        if beyond.any():
            pack = int(packs[np.argmax(beyond)])
            raise FormatError(f"{self.folder / PACKS_TABLE}: rows of pack {pack} do not add up")
        return packs

    def group_by_pack(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """(pack, places in `rows` that it serves) for every pack that is touched."""
        if not len(rows):
            return []
        packs = self.packs_of(rows)
        order = np.argsort(packs, kind="stable")
        touched, starts = np.unique(packs[order], return_index=True)
        places = np.split(order, starts[1:])
        return [(int(pack), place) for pack, place in zip(touched, places, strict=True)]

    def pack_view(self, pack: int) -> np.ndarray:
        """Codes of a pack, uint8 (N, C*h*w), without a copy."""
        size = self.manifest.contract.bytes_per_patch
        return np.frombuffer(self.pack_bytes(pack), np.uint8).reshape(-1, size)

    def pack_bytes(self, pack: int) -> memoryview:
        """Codes of a pack as they lie in the file; checked when a process first touches them."""
        content = self.views.get(pack)
        if content is not None:
            return content
        row, size = self.packs[pack], self.manifest.contract.bytes_per_patch
        content = self.slice_shard(pack, int(row["codes_offset"]), int(row["count"]) * size)
        if self.check_codes and not self.checked[pack]:
            if zlib.crc32(content) != int(row["codes_crc32"]):
                raise DamagedPackError(
                    f"{self.shard_path(pack)}, key {self.key(pack)}: codes do not have the "
                    "recorded checksum; the shard is damaged, fetch it anew ('latentds verify' "
                    "lists all damage)",
                    self,
                    pack,
                )
            self.checked[pack] = True
        if len(self.views) >= MAX_VIEWS:
            self.views.pop(next(iter(self.views)))
        self.views[pack] = content
        return content

    def pack_of(self, row: int) -> int:
        """The pack that holds a row of the patch table."""
        return int(np.searchsorted(self.first_patch, np.uint64(row), side="right")) - 1

    def shard_path(self, pack: int) -> Path:
        """File of a pack's shard."""
        return self.folder / self.manifest.shards[int(self.packs["shard"][pack])].name

    def slice_shard(self, pack: int, offset: int, size: int) -> memoryview:
        """Bytes of a pack's shard, refused where the table points outside of it."""
        shard = int(self.packs["shard"][pack])
        if shard >= len(self.manifest.shards):
            raise FormatError(
                f"{self.folder / PACKS_TABLE}: pack {pack} names shard {shard}; refused"
            )
        mapped = self.map_shard(shard)
        if offset + size > len(mapped):
            raise FormatError(
                f"{self.folder / PACKS_TABLE}: pack {pack} lies at {offset}..{offset + size}, "
                f"its shard has {len(mapped)} bytes; fetch the table anew"
            )
        return memoryview(mapped)[offset : offset + size]

    def map_shard(self, shard: int) -> mmap.mmap:
        """The memory map of a shard; the least recently used of many is closed."""
        mapped = self.maps.pop(shard, None)
        if mapped is None:
            with (self.folder / self.manifest.shards[shard].name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self.maps) >= MAX_OPEN_SHARDS:
                self.maps.popitem(last=False)  # unmapped when its last view is gone
        self.maps[shard] = mapped
        return mapped

    def read_columns(self, rows: np.ndarray, names: Sequence[str]) -> dict[str, list[Any]]:
        """Values of Parquet columns (key, source, source_encoding, ...) of patches at `rows`."""
        values: dict[str, list[Any]] = {name: [None] * len(rows) for name in names}
        for pack, places in self.group_by_pack(rows):
            columns = self.pack_columns(pack)
            first = int(self.packs["first_patch"][pack])
            for name in names:
                if name not in columns:
                    raise unknown_name("column", name, columns)
                for place in places:
                    values[name][place] = columns[name][int(rows[place]) - first]
        return values

    def pack_columns(self, pack: int) -> dict[str, list[Any]]:
        """All Parquet columns of a pack, and the key that follows from them."""
        from latentds.columns import SCHEMA

        columns = self.read_table(pack, PATCHES, SCHEMA)
        if "key" not in columns:
            places = zip(columns["source"], columns["x"], columns["y"], strict=True)
            columns["key"] = [patch_key(*place) for place in places]
        return columns

    def read_table(self, pack: int, kind: str, schema: Any) -> dict[str, list[Any]]:
        """A Parquet member of a pack as lists, parsed once and kept for a while."""
        from latentds.columns import decode_table

        table = self.tables.pop((pack, kind), None)
        if table is None:
            row, field = self.packs[pack], "patches" if kind == PATCHES else "masks"
            content = self.slice_shard(
                pack, int(row[f"{field}_offset"]), int(row[f"{field}_bytes"])
            )
            where = f"{self.shard_path(pack)}, {self.key(pack)}.{kind}"
            if zlib.crc32(content) != int(row[f"{field}_crc32"]):
                raise DamagedPackError(
                    f"{where}: not of the recorded checksum; damaged, fetch it anew", self, pack
                )
            table = decode_table(bytes(content), where, schema, int(row["count"])).to_pydict()
            if len(self.tables) >= MAX_CACHED_TABLES:
                self.tables.popitem(last=False)
        self.tables[pack, kind] = table
        return table

    def read_masks(self, rows: np.ndarray) -> np.ndarray:
        """Masks uint8 (N, H, W) of the patches at `rows`; zeros where a patch has none."""
        from latentds.columns import MASK_SCHEMA

        height, width = self.manifest.contract.patch_px
        masks = np.zeros((len(rows), height, width), np.uint8)
        for pack, places in self.group_by_pack(rows):
            if not self.packs["masks_bytes"][pack]:
                continue
            encoded = self.read_table(pack, MASKS, MASK_SCHEMA)["mask_png"]
            first, where = int(self.first_patch[pack]), f"{self.shard_path(pack)}, {self.key(pack)}"
            for place in places:
                png = encoded[int(rows[place]) - first]
                if png is not None:
                    masks[place] = decode_mask(png, (height, width), where)
        return masks


def decode_mask(encoded: bytes, size_px: tuple[int, int], where: str) -> np.ndarray:
    """A mask (H, W) from its PNG bytes, size checked before a pixel is decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as image:
            if image.size != size_px[::-1] or image.mode not in ("L", "1"):
                raise FormatError(
                    f"{where}: mask is {image.mode} {image.size}, patches are {size_px[::-1]}"
                )
            return np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError) as error:
        raise FormatError(f"{where}: damaged mask ({error})") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Refuse missing, truncated or grown shards before anything is read from them."""
    for shard in manifest.shards:
        try:
            size = (folder / shard.name).stat().st_size
        except FileNotFoundError as error:
            raise FormatError(
                f"{folder / shard.name}: missing; the manifest lists it, fetch it"
            ) from error
        if size != shard.bytes:
            raise FormatError(
                f"{folder / shard.name}: {size} bytes, the manifest says {shard.bytes}; truncated "
                "or replaced, fetch it anew"
            )


def open_table(path: Path, dtype: np.dtype[Any], rows: int) -> np.ndarray:
    """A memory-mapped table of just the expected columns, rows and bytes."""
    try:
        with path.open("rb") as file:
            head = io.BytesIO(file.read(TABLE_HEAD_BYTES))
        if np.lib.format.read_magic(head) != (1, 0):
            raise ValueError("npy version is not 1.0")
        shape, fortran, found = np.lib.format.read_array_header_1_0(head)
    except (*NPY_ERRORS, OSError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise FormatError(f"{path}: not a table ({reason}); fetch it anew") from error
    size = path.stat().st_size
    if found != dtype or fortran or shape != (rows,):
        raise FormatError(f"{path}: {found} {shape}, expected {rows} rows of {dtype}")
    if size != head.tell() + rows * dtype.itemsize:
        raise FormatError(f"{path}: {size} bytes are not {rows} rows; truncated, fetch it anew")
    return np.asarray(np.memmap(path, dtype, "r", offset=head.tell(), shape=(rows,)))
